"""Files: the normative format (`FORMAT.md`) and resumable writing."""
