"""A phrase book for the synthetic speakers: templates with a large vocabulary."""

from __future__ import annotations

import numpy as np

_NAMES = (
    "Anna Peter Maria Thomas Julia Oscar Sophie Martin Clara Henry Laura Victor Emma Daniel Nora "
    "Felix Alice Robert Helen Simon Grace Arthur Lucy Edward"
).split()

_EN: dict[str, list[str]] = {
    "adj": (
        "old young small large bright quiet heavy gentle wooden silver narrow broken clever hungry "
        "yellow purple distant frozen modern ancient curious shallow fragile cheerful thin warm "
        "green rough empty famous hollow jealous velvet useful wild tender sharp strange"
    ).split(),
    "noun": (
        "river garden teacher window engine mountain letter village kitchen soldier island doctor "
        "bridge basket lantern farmer machine painting orchard captain journey pocket thunder "
        "rabbit shoulder measure chapel valley cousin feather market shepherd treasure hammer "
        "question violin jungle zebra badge fish watch judge path month booth sauce choice voice "
        "cloud house boat road fire chair flower computer station theatre library bicycle"
    ).split(),
    "place": (
        "bridge station harbour forest museum school castle corner meadow office airport beach "
        "church tower factory theatre railway desert kitchen workshop"
    ).split(),
    "verb": (
        "found carried painted watched followed measured forgot repaired borrowed noticed "
        "discovered described ordered polished pushed weighed chose threw kept sold wanted heard "
        "remembered avoided joined questioned visited admired changed reached"
    ).split(),
    "adv": [
        "slowly", "quietly", "again", "yesterday", "together", "early", "carefully", "suddenly",
        "nearby", "without warning", "on Thursday", "in the evening", "for an hour", "at once",
        "before breakfast", "after the storm", "with great pleasure", "for no reason",
        "every year",
    ],
    "prep": "behind near under beyond across beside around towards inside above".split(),
    "num": (
        "two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty "
        "thirty forty-one fifty-six ninety sixty"
    ).split(),
    "month": "January March April June July August October November December".split(),
}  # fmt: skip
_EN_TEMPLATES = (
    "{name} {verb} the {adj} {noun} {prep} the {place}.",
    "The {adj} {noun} and the {noun} {verb} {num} {adj} {noun}s {adv}.",
    "Why did {name} say that the {noun} {verb} our {noun}?",
    "On the {num}th of {month}, {name} {verb} a {adj} {noun}.",
    "There were {num} {noun}s {prep} the {place}, and {name} {verb} them {adv}.",
    "I think this {noun} is {adj}, but {name}'s {noun} is {adj}.",
    "Please bring {num} {adj} {noun}s to the {place} {adv}!",
    "{adv}, the {noun} {prep} the {place} {verb} {name}.",
    "Have you ever {verb} a {noun} as {adj} as the one {prep} my {place}?",
    "If the {noun} is {adj}, we shall meet {name} {prep} the {place}.",
    "She {verb} it; he {verb} {num} others; nobody {verb} the {adj} {noun}.",
    "The {place} is {adj} in {month}, and the {noun} is too.",
    "{name} and {name} {verb} each other's {noun} {adv}.",
)

# Smaller books: subjects, verbs, objects, endings; every combination is a sentence.
_OTHER = {
    "de": (
        "Der alte Mann|Meine Schwester|Die junge Ärztin|Unser Nachbar|Der kleine Hund|Das Kind",
        "sieht|findet|vergisst|verkauft|sucht|malt|bringt|öffnet",
        "das grüne Haus|einen schweren Koffer|die lange Brücke|zwölf Äpfel|den Schlüssel|ein Buch",
        "am Abend|in der Stadt|ohne Grund|vor dem Frühstück|mit großer Freude|jeden Mittwoch",
    ),
    "fr": (
        "Le vieux pêcheur|Ma cousine|Notre voisin|La jeune fille|Le petit chien|Un musicien",
        "regarde|trouve|oublie|vend|cherche|apporte|dessine|ouvre",
        "la maison verte|une valise lourde|le grand pont|douze pommes|la clé du jardin|un livre",
        "ce soir|dans la rue|sans raison|avant le déjeuner|avec plaisir|chaque jeudi",
    ),
    "es": (
        "El viejo pescador|Mi hermana|Nuestro vecino|La joven doctora|El perro pequeño|Un músico",
        "mira|encuentra|olvida|vende|busca|trae|dibuja|abre",
        "la casa verde|una maleta pesada|el puente largo|doce manzanas|la llave|un libro",
        "por la noche|en la ciudad|sin razón|antes del desayuno|con alegría|cada jueves",
    ),
    "it": (
        "Il vecchio pescatore|Mia cugina|Il nostro vicino|La giovane maestra|Il cane|Un musicista",
        "guarda|trova|dimentica|vende|cerca|porta|disegna|apre",
        "la casa verde|una valigia pesante|il ponte lungo|dodici mele|la chiave|un libro",
        "di sera|in città|senza ragione|prima di colazione|con gioia|ogni giovedì",
    ),
    "pt": (
        "O velho pescador|Minha irmã|Nosso vizinho|A jovem professora|O cachorro|Um músico",
        "olha|encontra|esquece|vende|procura|traz|desenha|abre",
        "a casa verde|uma mala pesada|a ponte longa|doze maçãs|a chave|um livro",
        "à noite|na cidade|sem razão|antes do café|com alegria|toda quinta-feira",
    ),
}


def sentence(rng: np.random.Generator, language: str = "en-us") -> str:
    """A random sentence in a language, given by its espeak-ng code ("en-gb", "de", ...).

    Raises:
        ValueError: there is no phrase book for the language.
    """
    prefix = language.split("-")[0]
    if prefix in _OTHER:
        subject, verb, thing, ending = (
            str(rng.choice(words.split("|"))) for words in _OTHER[prefix]
        )
        return f"{subject} {verb} {thing} {ending}."
    if prefix != "en":
        raise ValueError(
            f"synth: no phrase book for language {language!r}; expected one of "
            f"{sorted(['en', *_OTHER])}"
        )
    text = str(rng.choice(_EN_TEMPLATES))
    while "{" in text:
        start = text.index("{")
        end = text.index("}")
        slot = text[start + 1 : end]
        word = str(rng.choice(_NAMES if slot == "name" else _EN[slot]))
        text = text[:start] + word + text[end + 1 :]
    return text[0].upper() + text[1:]
