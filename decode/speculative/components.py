"""Every drafter and acceptance rule: the table from which names, tests and pages are made.

One file and one line here each. See `decode.speculative.contracts` for what a drafter must do, and
`decode.speculative.accept` for the rules.
"""

from decode.speculative.accept import AcceptanceRule
from decode.speculative.accept import BlockVerification as BlockVerification
from decode.speculative.accept import Match as Match
from decode.speculative.accept import SpeculativeSampling as SpeculativeSampling
from decode.speculative.accept import TraversalVerification as TraversalVerification
from decode.speculative.accept import Typical as Typical
from decode.speculative.contracts import Drafter
from decode.speculative.drafters.aded import ADED as ADED
from decode.speculative.drafters.ddtree import DDTree as DDTree
from decode.speculative.drafters.dflash import DFlash as DFlash
from decode.speculative.drafters.draft_model import DraftModel as DraftModel
from decode.speculative.drafters.draft_model import DraftModelBest as DraftModelBest
from decode.speculative.drafters.draft_model import DraftModelTree as DraftModelTree
from decode.speculative.drafters.dynamic_exit import DynamicExit as DynamicExit
from decode.speculative.drafters.eagle import Eagle as Eagle
from decode.speculative.drafters.eagle import EagleBest as EagleBest
from decode.speculative.drafters.hybrid import Hybrid as Hybrid
from decode.speculative.drafters.hydra import Hydra as Hydra
from decode.speculative.drafters.input_guided import InputGuided as InputGuided
from decode.speculative.drafters.jacobi import Jacobi as Jacobi
from decode.speculative.drafters.lookahead import Lookahead as Lookahead
from decode.speculative.drafters.masks import Masks as Masks
from decode.speculative.drafters.medusa import Medusa as Medusa
from decode.speculative.drafters.no_draft import NoDraft as NoDraft
from decode.speculative.drafters.opt_tree import DraftModelOpt as DraftModelOpt
from decode.speculative.drafters.opt_tree import EagleOpt as EagleOpt
from decode.speculative.drafters.prompt_lookup import PromptLookup as PromptLookup
from decode.speculative.drafters.rest import REST as REST
from decode.speculative.drafters.rsd import DraftModelBeam as DraftModelBeam
from decode.speculative.drafters.sam import SAM as SAM
from decode.speculative.drafters.self_speculation import SelfSpeculation as SelfSpeculation
from decode.speculative.drafters.specdec_pp import SpecDecPP as SpecDecPP
from decode.speculative.drafters.speculative_jacobi import SpeculativeJacobi as SpeculativeJacobi
from decode.speculative.drafters.suffix import Suffix as Suffix
from decode.speculative.drafters.swift import Swift as Swift
from decode.speculative.drafters.token_recycling import TokenRecycling as TokenRecycling

DRAFTERS: tuple[type[Drafter], ...] = tuple(
    member
    for member in tuple(globals().values())
    if isinstance(member, type) and issubclass(member, Drafter) and member is not Drafter
)
ACCEPTANCE_RULES: tuple[type[AcceptanceRule], ...] = tuple(
    member
    for member in tuple(globals().values())
    if isinstance(member, type)
    and issubclass(member, AcceptanceRule)
    and member is not AcceptanceRule
)
