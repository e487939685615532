"""Which text stands for token ids where a server takes text only?"""

from __future__ import annotations

from collections.abc import Iterable

_TEXT = (
    "about above after again air all along also always another answer around ask away back because before began "
    "being below between big book both boy build but call came carry change children city close come could country "
    "cut day different does done door down each early earth eat end enough even every example eye face family far "
    "father feet few find first follow food found four from girl give good great group grow hand hard head hear help "
    "here high home house idea important keep kind know land large last late learn leave left letter life light line "
    "list little live long look made make many mean might mile money more most mother mountain move much music must "
    "name near need never new next night number often old once only open other over own page paper part people place "
    "plant play point question quick read real right river run said same school second see seem sentence set should "
    "show side small song soon sound spell stand start state stop story study such take talk tell than thing think "
    "those thought three time today together tree turn under until use very walk want watch water way well went what "
    "where which while white who why will with without word work world would write year young"
)
_WORDS = _TEXT.split()
"""Common words, which most vocabularies have as one token each with the space before it."""


def words(token_ids: Iterable[int]) -> str:
    """One word per id, the same for the same id: prompts that share a prefix of ids share a prefix of text."""
    return " ".join([_WORDS[token_id % len(_WORDS)] for token_id in token_ids])
