# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A point in time after which nothing may go on."""

from __future__ import annotations

import time
import typing as t

from ._errors import CloneError

_Default = t.TypeVar("_Default", float, None)


def stated_seconds(params: t.Mapping[str, t.Any], parameter: str, default: _Default) -> t.Union[float, _Default]:
    """How long a task lets something take.

    :raises CloneError: ``INVALID_ARG`` for less than no time
    """
    value = params.get(parameter)
    if value is None:
        return default
    if value < 0:
        raise CloneError("INVALID_ARG", f"{parameter}: {value} seconds is less than none")
    return float(value)


class Deadline:
    """``seconds`` from now, or never when None. ``parameter`` is the option that set it, for the message."""

    def __init__(self, seconds: t.Optional[float], parameter: str) -> None:
        self.seconds = seconds
        self.parameter = parameter
        self._end = None if seconds is None else time.monotonic() + seconds

    def check(self, doing: str) -> None:
        """Raise ``TIMEOUT`` once the time is up; ``doing`` completes "gave up ..."."""
        if self._end is not None and time.monotonic() >= self._end:
            raise CloneError("TIMEOUT", f"gave up {doing} after {self.seconds:g} s ({self.parameter})")

    def sooner(self, seconds: float, parameter: str) -> Deadline:
        """This deadline, or one ``seconds`` from now if that comes first."""
        other = Deadline(seconds, parameter)
        return other if self._end is None or t.cast(float, other._end) < self._end else self

    def wait_for(self, attempt: t.Callable[[], bool], doing: str) -> None:
        """Repeat ``attempt`` until it is true, more slowly as time goes by, at most twice a second."""
        pause = 0.01
        while not attempt():
            self.check(doing)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
