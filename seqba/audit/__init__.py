"""The mask audit: which random operations of a model are per copy, shared by the copies, or inactive."""

from seqba.audit.masks import audit_masks as audit_masks
from seqba.audit.report import IdenticalCopiesError as IdenticalCopiesError
from seqba.audit.report import MaskAudit as MaskAudit
from seqba.audit.report import Operation as Operation
from seqba.audit.report import check_copies_differ as check_copies_differ
