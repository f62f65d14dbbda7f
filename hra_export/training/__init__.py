"""Training HRA adapters: PEFT's tuner with fast layers, the regularizer, data, and the loop behind `hra-export train`.

Needs the extra `train` (peft, trl, datasets, accelerate, matplotlib, scikit-learn).
"""
