# For mypy alone: `custom_generate.py` is published beside a copy of `decoding/mixin.py`, from which it imports these.

from ..decoding.mixin import decode_by as decode_by
from ..decoding.mixin import setting_of as setting_of
