"""Every search strategy: the table from which names, tests and pages are made.

One file and one line here each. See `decode.search.contracts` for what a strategy must do.
"""

from decode.search.contracts import Strategy
from decode.search.loop import SearchMethod
from decode.search.strategies.adadec import AdaDec as AdaDec
from decode.search.strategies.beam import Beam as Beam
from decode.search.strategies.cntp import CNTP as CNTP
from decode.search.strategies.conditional_beam import ConditionalBeam as ConditionalBeam
from decode.search.strategies.contrastive import Contrastive as Contrastive
from decode.search.strategies.diverse_beam import DiverseBeam as DiverseBeam
from decode.search.strategies.momentum import Momentum as Momentum
from decode.search.strategies.superposed import Superposed as Superposed

STRATEGIES: tuple[type[Strategy], ...] = tuple(
    member
    for member in tuple(globals().values())
    if isinstance(member, type) and issubclass(member, Strategy) and member is not Strategy
)
METHODS: dict[str, SearchMethod] = {
    name: SearchMethod(strategy, strategy.sampling)
    for kind in STRATEGIES
    for name, strategy in kind.points().items()
}
