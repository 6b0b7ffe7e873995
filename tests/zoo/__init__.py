"""The zoo: one small representative of every kind of model, each checked for everything that "adapted right" means.

`inventory` lists the entries, `check` judges one of them, `run` judges all of them in worker processes (`make zoo`).
"""
