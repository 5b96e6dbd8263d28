# SPDX-License-Identifier: Apache-2.0
"""Numbers and texts as people read them: one way for every table, plot and sentence."""

from collections.abc import Sequence

__all__ = [
    'exact',
    'first_of',
    'flop',
    'gigabytes',
    'hours',
    'one_line',
    'percent',
    'scientific',
    'short',
    'shortened',
    'signed',
]

_LETTERS = ((12, 'T'), (9, 'B'), (6, 'M'), (3, 'k'))


def short(value: float) -> str:
    """A count, rounded to three digits: 0.53 M, 299 B."""
    # 0.53 M rather than 530 k: budgets are compared in millions
    power, letter = next(((p, x) for p, x in _LETTERS if value >= 10 ** (5 if p == 6 else p)), (0, ''))
    value /= 10**power
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f'{value:.{digits}f} {letter}' if letter else f'{value:.0f}'


def shortened(name: str, width: int) -> str:
    """A name of at most so many characters: its beginning and its end."""
    return name if len(name) <= width else f'{name[: width // 2]}…{name[len(name) - (width - 1) // 2 :]}'


def exact(value: float) -> str:
    """A count with up to six digits, for the ticks of an axis: 183 B, 2.5 k."""
    power, letter = next(((p, x) for p, x in _LETTERS if value >= 10**p), (0, ''))
    return f'{value / 10**power:.6g} {letter}'.strip()


def percent(share: float) -> str:
    """A share: 37 %."""
    return f'{100 * share:.0f} %'


def scientific(value: float) -> str:
    """A learning rate: 3e-4."""
    mantissa, exponent = f'{value:.2e}'.split('e')
    return '0' if value == 0 else f'{float(mantissa):g}e{int(exponent)}'


def signed(value: float, digits: int) -> str:
    """A change with its sign; a change that rounds to zero has none."""
    text = f'{value:+.{digits}f}'
    return text if float(text) else text[1:]


def flop(value: float) -> str:
    """Floating point operations: 3.86 TFLOP."""
    power, letter = next(((p, x) for p, x in ((21, 'Z'), (18, 'E'), (15, 'P'), (12, 'T')) if value >= 10**p), (9, 'G'))
    return f'{value / 10**power:.3g} {letter}FLOP'


def gigabytes(size: float) -> str:
    """Bytes: 116 GB, 10.5 MB."""
    power, letter = next(((p, x) for p, x in ((12, 'T'), (9, 'G')) if size >= 10**p), (6, 'M'))
    return f'{size / 10**power:.3g} {letter}B'


def hours(value: float) -> str:
    """Hours, rounded to three digits: 12,300, 3.1, 0.0004."""
    return f'{float(f"{value:.3g}"):,g}'


def one_line(said: object) -> str:
    """A text, such as an error, in one line."""
    return ' '.join(str(said).split())


def first_of(problems: Sequence[str]) -> str:
    """The first three of some problems, in one line."""
    return '; '.join(problems[:3]) + (f' (and {len(problems) - 3} more)' if len(problems) > 3 else '')
