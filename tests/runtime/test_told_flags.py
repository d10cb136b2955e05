"""What refusals name, as every test that refuses a command line demands it: told_flags.py."""

import pytest
from told_flags import check_named, foreign


@pytest.mark.parametrize(
    "script, args, line, found",
    [
        ("edm", "--sample a.pt", "or type --metric-data NAME", []),
        ("edm", "--sample a.pt", "or type --metric-every 3, or --lr", ["--metric-every", "--lr"]),
        ("edm", "--sample a.pt --lr 3", "--lr has no part in --sample: leave it out", []),
        ("edm", "", "--column is for --sample: leave it out", ["--column"]),
        ("edm", "", "--metric-data is for a training; --no-class-cond", []),
        ("ddim", "--encode a.pt", "type python ddpm_pixel.py --lr 3; then --lr 4", ["--lr"]),
        ("ddim", "--encode=a.pt", "type --encode-steps", []),
        ("ddim", "--sample a.pt", "type python -m networks.published a.pt --size 32", []),
        ("eval_fid", "a b", "give --steps", ["--steps"]),
        ("evaluation.curves", "a", "--over x: no such setting", []),
    ],
)
def test_flags_that_a_command_does_not_take_are_found(script, args, line, found):
    assert foreign(script, args.split(), line) == found
    if found:
        with pytest.raises(AssertionError, match=f"has no {', '.join(found)}: "):
            check_named(script, args.split(), line)
    else:
        check_named(script, args.split(), line)
