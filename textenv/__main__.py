"""``python -m textenv``, which ``accelerate launch -m textenv`` runs in several processes."""

from textenv.cli import end, main

end(main())
