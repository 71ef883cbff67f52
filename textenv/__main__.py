"""``python -m textenv``, which ``accelerate launch -m textenv`` runs in several processes."""

import sys

from textenv.cli import main

sys.exit(main())
