"""Plan the export of a translator by the kind of its decoder."""

from torch import nn

from scripts.exporting import recurrent_translation, translation
from scripts.exporting.plan import Plan
from seq2seq.models.recurrent import RecurrentTranslator
from seq2seq.tasks.translation import Translation


def plan(model: nn.Module, task: Translation) -> Plan:
    """Plan the export of a translator; raises UserError if the model's class is not known."""
    if isinstance(model, RecurrentTranslator):
        return recurrent_translation.plan(model, task)
    return translation.plan(model, task)
