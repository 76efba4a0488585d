"""A trial step of a copy of the model: its regions as graphs, and what each keeps for backward."""

from velora_fx.analyse.trial.captured import captured, with_traced_graphs
from velora_fx.analyse.trial.compiler_saves import KeptTensors
from velora_fx.analyse.trial.lengthened_findings import lengthen_findings
from velora_fx.analyse.trial.probe import Findings, Use, full_name, probe
from velora_fx.analyse.trial.rehearsal import Rehearsal

__all__ = [
    "Findings",
    "KeptTensors",
    "Rehearsal",
    "Use",
    "captured",
    "full_name",
    "lengthen_findings",
    "probe",
    "with_traced_graphs",
]
