"""The ops `mats`, `regmean` and `weighted_average`: validate, choose the solver, call."""
