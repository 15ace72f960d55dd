"""The countries of the world and what the facts are about. Read from the packages countryinfo and pycountry."""

from __future__ import annotations

from dataclasses import dataclass

CONTINENTS = ("Africa", "Americas", "Asia", "Europe", "Oceania")
_LEAST_POPULATION = 1_000_000
# Those without one undisputed capital (moved, shared, disputed, several), that no longer exist, or with a name twice.
_LEFT_OUT = "BI BO BJ CI GQ HK IL KZ LK MY MM NL PS PR CS SZ TZ XK YE ZA AN TW SG KW PA GT DJ"
# Where the currency's unit is not the last word of its name.
_UNITS = {"CFA Franc BCEAO": "franc", "CFA Franc BEAC": "franc", "Rial Omani": "rial", "Cordoba Oro": "cordoba"}
_UNITS |= {"Pound Sterling": "pound", "Yuan Renminbi": "yuan", "Convertible Mark": "mark"}
# Where countryinfo lists a unit of account first, or an earlier currency.
_CURRENCIES = {"CH": "CHF", "CL": "CLP", "UY": "UYU", "SV": "USD"}
_USUAL = {"Pushto": "Pashto", "Modern Greek": "Greek", "Kirghiz": "Kyrgyz", "Washington D.C.": "Washington"}
_USUAL |= {"Republic of Macedonia": "North Macedonia"}


@dataclass(frozen=True)
class Country:
    """A country; the currency is its unit (`dollar`), the language the first of the official ones."""

    name: str
    continent: str
    capital: str
    currency: str
    language: str


def read_countries() -> list[Country]:
    """Return the countries with a million inhabitants of which all is known, by name.

    Raises ImportError without the packages of the extra `real`.
    """
    import pycountry
    from countryinfo import all_countries

    found: dict[str, Country] = {}
    for entry in all_countries():
        info = entry.info()
        code = info.get("ISO", {}).get("alpha2", "").upper()
        capital, continent = info.get("capital"), info.get("region")
        if code in found or code in _LEFT_OUT.split() or continent not in CONTINENTS or not isinstance(capital, str):
            continue
        first = (info.get("currencies") or [""])[0]
        currency = pycountry.currencies.get(alpha_3=_CURRENCIES.get(code, first))
        language = pycountry.languages.get(alpha_2=(info.get("languages") or [""])[0])
        if currency is None or language is None or (info.get("population") or 0) < _LEAST_POPULATION:
            continue
        unit = _UNITS.get(currency.name, currency.name.split()[-1].lower())
        spoken = language.name.partition(" (")[0]
        words = (info["name"], continent, capital.strip(), unit, spoken)
        found[code] = Country(*(_USUAL.get(word, word) for word in words))
    return sorted(found.values(), key=lambda country: country.name)
