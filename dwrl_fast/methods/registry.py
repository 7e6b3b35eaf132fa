"""The methods behind `--method`, a line each: the module of methods/ and the class. A new method is a new file and a
line here.
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
