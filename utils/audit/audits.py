"""Every audit there is."""

from utils.audit.base import Audit
from utils.audit.bypass import BYPASS
from utils.audit.evasion import EVASION
from utils.audit.inversion import INVERSION
from utils.audit.membership import MEMBERSHIP
from utils.audit.probe import PROBE
from utils.audit.sampling import SAMPLING

AUDITS: dict[str, Audit] = {
    audit.name: audit
    for audit in (
        MEMBERSHIP,
        BYPASS,
        EVASION,
        INVERSION,
        PROBE,
        SAMPLING,
    )
}
