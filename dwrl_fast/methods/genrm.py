"""`genrm`: supervised fine-tuning on the label of the better response, without a thought (docs/method.md, 3).

It is `gram` with the whole target on the right label.
"""

from dwrl_fast.methods.gram import Gram


class GenRM(Gram):
    """`gram` with the whole target on the right label."""

    name = "genrm"
    summary = "gram without label smoothing"
    smoothing = 0.0
