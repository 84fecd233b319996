"""The rows of the reuse table are strategies that there are, with options that they have."""

import pytest

from kvjax.benchmarks import reuse_claims, reuse_methods
from kvjax.reuse import STRATEGIES, parse

CONTROLS = {"full"}  # no strategy


@pytest.mark.parametrize("spec", reuse_methods.BY_SPEC)
def test_every_method_is_a_spec_that_its_strategy_reads(spec):
    name = spec.partition(":")[0]
    if name not in STRATEGIES:
        assert name in CONTROLS
        return
    strategy = parse(spec)
    assert type(strategy) is STRATEGIES[name]
    assert parse(strategy.spec) == strategy or not spec.partition(":")[2]


def test_claims_are_about_methods_of_the_table():
    specs = {term.method for claim in reuse_claims.CLAIMS for term in claim.terms}
    assert specs <= set(reuse_methods.BY_SPEC)
