"""`python -m hf_jacobi`, which launchers such as `accelerate launch -m hf_jacobi` start."""

import sys

from .cli import main


sys.exit(main())
