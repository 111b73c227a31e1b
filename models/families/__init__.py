"""Model families, one file each; this one only collects them.

To add a family, write a file that ends with `FAMILY = Family(...)`; docs/FAMILIES.md says how.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_edge.models.families.family import Architecture, Checkpoint, Family
from moe_edge.models.registry import collect

FAMILIES = collect(__name__, __path__, "FAMILY", Family)

ARCHITECTURES: Mapping[str, Architecture] = {
    each.name: each for family in FAMILIES.values() for each in family.architectures
}
REFUSED: Mapping[str, str] = {name: why for family in FAMILIES.values() for name, why in family.refused.items()}
REFUSED_CLASSES: Mapping[str, str] = {
    name: why for family in FAMILIES.values() for name, why in family.refused_classes.items()
}
CHECKPOINTS: Mapping[str, Checkpoint] = {
    name: each for family in FAMILIES.values() for each in family.checkpoints for name in each.classes
}
