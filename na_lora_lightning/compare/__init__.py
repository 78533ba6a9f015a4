"""``na-lora compare``: ways to fine-tune, side by side on one's own data.

``plan`` says what is compared, ``storage`` keeps it in Optuna, which ``opening`` opens, and shares it among workers,
``grid`` chooses rates, ``cells`` trains one fit, ``measuring`` and ``forgetting`` score it, ``statistics`` tells
differences from chance, and ``results`` and ``page`` write what came out.
"""
