"""`python -m hf_hyper.cli` is `hf-hyper`."""

import sys

from hf_hyper.cli import main

sys.exit(main())
