"""The names of the methods that are trained."""

SINGLE_TASK, HARD_SHARING, CROSS_STITCH, MTAN = "single_task", "hard_sharing", "cross_stitch", "mtan"
TSBN, TS_SIGMA_BN, TSLN, TS_SIGMA_LN = "tsbn", "ts_sigma_bn", "tsln", "ts_sigma_ln"
TASK_SPECIFIC = TSBN, TS_SIGMA_BN, TSLN, TS_SIGMA_LN  # whose normalisation takes a multiplier of the learning rate
PAPER_MULTIPLIER = {TS_SIGMA_BN: 100.0, TS_SIGMA_LN: 10.0}  # of the methods that have gates
MULTIPLIERS = (1.0, 10.0, 100.0, 1000.0)  # the paper's ablation
