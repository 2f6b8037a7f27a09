"""The entry of `python -m hf_jacobi`, for launchers such as `accelerate launch -m hf_jacobi`."""

import sys

from .cli import main


sys.exit(main())
