"""Numbers on the command line that make no sense are refused there (arguments.py)."""

from __future__ import annotations

import pytest

from rayseek.serve_app.arguments import parser


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("plan h200-8 --requests-per-second -3", "-3 is not a number above 0"),
        ("plan h200-8 --requests-per-second nan", "nan is not a number above 0"),
        ("plan h200-8 --simulate inf", "inf is not a number above 0"),
        ("plan h200-8 --cached 1.5", "1.5 is not a share from 0 to 1"),
        ("eval --questions 0", "0 is not a whole number from 1"),
        ("bench --output 1.5", "1.5 is not a whole number from 1"),
        ("chaos --kills some", "some is not a whole number from 0"),
        ("serve --port 65536", "65536 is not a port from 1 to 65535"),
        ("keys add me --concurrent -1", "-1 is not a whole number from 1"),
    ],
)
def test_a_number_out_of_range_is_named(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(command.split())
    assert said in capsys.readouterr().err


def test_numbers_in_range_are_taken() -> None:
    command = "plan h200-8 --requests-per-second 1e-3 --cached 0 --price 0 --prompt 1"
    found = parser().parse_args(command.split())
    assert (found.requests_per_second, found.cached, found.price, found.prompt) == (1e-3, 0, 0, 1)
