"""The methods behind `--method`, one line each: the module in methods/ and the class. A new method needs a new file and
one line here.
"""

WHERE = (
    "dwrl:DualWeightedRL",
    "btpo:JointDualWeightedRL",
    "bt:BradleyTerry",
    "gram:Gram",
    "genrm:GenRM",
    "pairrm:PairRM",
    "grpo_pair:PairwiseGroupRelative",
    "grpo_point:PointwiseGroupRelative",
    "star_sft:StarImitation",
    "star_dpo:StarContrast",
    "star_rationalizer:StarRationalizer",
    "judge:Judge",
    "sft:SupervisedFineTuning",
    "dpo:DirectPreference",
)
