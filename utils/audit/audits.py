"""Every audit there is."""

from utils.audit.base import Audit
from utils.audit.bypass import BYPASS
from utils.audit.membership import MEMBERSHIP
from utils.audit.quantisation import QUANTISATION
from utils.audit.relearning import RELEARNING
from utils.audit.soft_attack import SOFT_ATTACK

AUDITS: dict[str, Audit] = {
    audit.name: audit
    for audit in (
        MEMBERSHIP,
        BYPASS,
        RELEARNING,
        QUANTISATION,
        SOFT_ATTACK,
    )
}
