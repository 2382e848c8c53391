"""What a value is that a user gave for a setting: it may be anything."""

from __future__ import annotations

import torch


def is_integer(value: object) -> bool:
    """Whether it counts; True and False do not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is an integer or a float."""
    return is_integer(value) or isinstance(value, float)


def is_device(value: object) -> bool:
    """Whether it is the name of a device, which need not be there."""
    try:
        return isinstance(value, str) and bool(torch.device(value).type)
    except RuntimeError:
        return False


def is_code_range(value: object) -> bool:
    """Whether it is the least and the greatest of some int8 codes."""
    if not (isinstance(value, tuple) and len(value) == 2 and all(is_integer(v) for v in value)):
        return False
    return bool(-128 <= value[0] < value[1] <= 127)
