"""What the warmed-up model is asked, in its tokenizer's few words: a template for each kind that methods judge by.

They ask as the warm-up did, so they need not say which answer is wanted. They reach a method in the card of a model
folder, and stay there when it is trained and saved.
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
# The method that an untrained model of a kind is scored by.
UNTRAINED = {"dialog": "dwrl", "pairwise": "judge", "pointwise": "grpo-point", "direct": "genrm"}

# A question that gives the verdict is none of the warm-up's, so nothing but a file can say what it is.
RATIONALIZER = Path(__file__).with_name("rationalizer.yaml")
