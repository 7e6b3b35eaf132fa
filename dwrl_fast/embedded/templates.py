"""The templates of the embedded task, one for each kind, in the few words of its tokenizer.

They ask in the same form as the warm-up, so they need not describe the answer. A method gets them from the card of a
model folder, and saves them with the trained model.
"""

from pathlib import Path

from dwrl_fast.dialog import Template
from dwrl_fast.embedded.arrays import EVALUATE, RATE

_COMPARE = "compare {prompt} A {response_a} B {response_b}"
TEMPLATES = {
    template.kind: template
    for template in (
        Template(EVALUATE, RATE),
        Template(_COMPARE, labels=None, kind="pairwise"),
        Template("score {prompt} {response}", labels=None, kind="pointwise"),
        Template(_COMPARE, labels=("A", "B"), kind="direct"),
    )
}
# The method that scores an untrained model with a template of this kind.
UNTRAINED = {"dialog": "dwrl", "pairwise": "judge", "pointwise": "grpo-point", "direct": "genrm"}

# The warm-up has no question that contains the verdict, so this template is a file.
RATIONALIZER = Path(__file__).with_name("rationalizer.yaml")
