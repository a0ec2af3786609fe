"""Every audit there is."""

from utils.audit.base import Audit
from utils.audit.bypass import BYPASS
from utils.audit.evasion import EVASION
from utils.audit.inversion import INVERSION
from utils.audit.membership import MEMBERSHIP
from utils.audit.probe import PROBE
from utils.audit.quantisation import QUANTISATION
from utils.audit.relearning import RELEARNING
from utils.audit.sampling import SAMPLING
from utils.audit.soft_attack import SOFT_ATTACK

AUDITS: dict[str, Audit] = {
    audit.name: audit
    for audit in (
        MEMBERSHIP,
        BYPASS,
        EVASION,
        INVERSION,
        RELEARNING,
        QUANTISATION,
        PROBE,
        SAMPLING,
        SOFT_ATTACK,
    )
}
