"""What the gate scores: the names in its verdicts, in the order of the model's outputs.

The first eleven are level-1 categories of ProGuard (arXiv:2512.23573), the others are ours.
"""

from __future__ import annotations

COPYRIGHT = "Copyright"
MISINFORMATION = "Misinformation & Private Information"
DECEPTION = "Malicious Deception & Suggestion"
CYBERSECURITY = "Cybersecurity Technology"
ENVIRONMENT = "Living Environment Hazards"
FINANCIAL_CRIME = "Financial Crime"
HATE = "Hate and Terror"
DANGEROUS_GOODS = "Dangerous Goods"
REAL_WORLD_HARM = "Real-World Harm"
GORE = "Blood-Related Disturbing Content"
SEXUAL = "Sexual Exposure"
OFFENSIVE = "Offensive Language"
INJECTION = "Prompt Injection"
HARMFUL = "Harmful"  # any of the harms, also one that none of the other names fits
EXPLICIT_IMAGE = "Explicit Image"  # from the picture's own model

TEXT_CATEGORIES = (
    COPYRIGHT,
    MISINFORMATION,
    DECEPTION,
    CYBERSECURITY,
    ENVIRONMENT,
    FINANCIAL_CRIME,
    HATE,
    DANGEROUS_GOODS,
    REAL_WORLD_HARM,
    GORE,
    SEXUAL,
    OFFENSIVE,
    INJECTION,
    HARMFUL,
)
HARMS = TEXT_CATEGORIES[:11]
CATEGORIES = (*TEXT_CATEGORIES, EXPLICIT_IMAGE)
