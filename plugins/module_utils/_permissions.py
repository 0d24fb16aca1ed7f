# Copyright (c) 2026, the virtforge.libvirt authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Owner, group and mode, as tasks state them and as the system has them."""

from __future__ import annotations

import grp
import pwd
import re
import typing as t

from ._errors import CloneError

_SYMBOLIC_MODE = re.compile(r"([ugoa]+)([-+=])([rwxX]*)")


class Mode:
    """A file mode as Ansible takes it: octal as number or text, or symbolic (``u=rw,g=r,o-rwx``).

    A number has neither the bit of set-user-ID nor the sticky one: YAML reads an unquoted 711 as 0o1307, and so each mode from
    512 to 1023. A mode that has one of these bits has to be text.

    :param allowed: the bits that an octal mode may have
    """

    def __init__(self, value: t.Union[int, str], parameter: str = "mode", allowed: int = 0o777) -> None:
        self.octal: t.Optional[int] = None
        self._clauses: t.List[t.Tuple[str, str, str]] = []
        text = str(value).strip()
        if isinstance(value, bool):
            raise CloneError("INVALID_ARG", f"{parameter}: {value!r} is neither an octal nor a symbolic mode")
        if isinstance(value, int):
            self.octal = value
            allowed &= 0o2777
        elif re.fullmatch(r"(0o)?[0-7]+", text):
            self.octal = int(text.replace("o", ""), 8)
        else:
            for clause in text.split(","):
                match = _SYMBOLIC_MODE.fullmatch(clause.strip())
                if match is None:
                    raise CloneError("INVALID_ARG", f"{parameter}: {value!r} is neither an octal nor a symbolic mode")
                self._clauses.append((match.group(1), match.group(2), match.group(3)))
        if self.octal is not None and self.octal & ~allowed:
            raise CloneError(
                "INVALID_ARG",
                f"{parameter}: {value!r} has bits outside {allowed:04o} (an octal mode must be quoted or start with 0)",
            )

    def on(self, current: int) -> int:
        """The mode in bits that a file with the mode ``current`` shall have."""
        if self.octal is not None:
            return self.octal
        for who, operator, letters in self._clauses:
            bits = sum({"r": 4, "w": 2, "x": 1}.get(letter, 0) for letter in set(letters) - {"X"})
            if "X" in letters and current & 0o111:
                bits |= 1
            for shift in _shifts(who):
                if operator == "=":
                    current = current & ~(7 << shift) | bits << shift
                elif operator == "+":
                    current |= bits << shift
                else:
                    current &= ~(bits << shift)
        return current


def _shifts(who: str) -> t.Iterable[int]:
    return {shift for letter in who for shift in {"u": (6,), "g": (3,), "o": (0,), "a": (6, 3, 0)}[letter]}


def user_id(value: str) -> int:
    return _id(value, "owner", "user", lambda name: pwd.getpwnam(name).pw_uid)


def group_id(value: str) -> int:
    return _id(value, "group", "group", lambda name: grp.getgrnam(name).gr_gid)


def _id(value: str, parameter: str, kind: str, look_up: t.Callable[[str], int]) -> int:
    """A number, or what the name stands for. 4294967295 is no number of anybody: chown(2) takes it for "leave as it is"."""
    if re.fullmatch("[0-9]{1,10}", value) and int(value) < 2**32 - 1:
        return int(value)
    try:
        return look_up(value)
    except (KeyError, ValueError):
        raise CloneError("INVALID_ARG", f"{parameter}: there is no {kind} {value!a}") from None


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
