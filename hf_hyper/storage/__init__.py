"""Files: the normative format (`FORMAT.md`), checks of what is read, and resumable writing."""
