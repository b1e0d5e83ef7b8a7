"""Words next to a number: units, and words that change its value or join several numbers."""

import re


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These change the number before or after them: "5 million", "square root of 5".
CHANGE = _set("""
    hundred hundreds thousand thousands million millions billion billions trillion trillions
    dozen dozens lakh crore half halves third thirds fourth fourths quarter quarters fifth fifths
    sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths
    thousandth thousandths th st nd rd plus minus negative times over divided multiplied mod
    modulo pmod bmod choose squared cubed factorial root roots sqrt log ln exp sin cos tan cot csc
    pi infinity infty inf nan point base power repeating recurring radicals
    tens mil mils bn below
""")
# These join numbers: "3 and 5", "3 to 5".
JOIN = _set("and or to through until than not but versus vs between")
# Words in a unit's text that a number can follow: "in 3 days".
BEFORE_DIGITS = _set("in per for every each after within by at")
UNITS = _set("""
    mm cm dm km nm um ft in inch inches foot feet yd yds yard yards mi mile miles meter meters
    metre metres kg mg lb lbs oz ounce ounces pound pounds gram grams ton tons ml mL cl dl kL
    liter liters litre litres sec secs second seconds min mins minute minutes hr hrs hour hours
    day days week weeks month months year years yr yrs mph kmh kph Hz kHz MHz GHz kW MW kWh kJ
    kPa Pa bar mol rad deg degree degrees percent pct USD EUR GBP dollar dollars cent cents euro
    euros units unit sq cu
""")
LETTERS = _set("m g s L")  # units of one letter
TEXT_LETTERS = _set("m g s h l L N J W V A K C F")  # units of one letter in LaTeX text
# A number after these is a label, not a quantity: "see step 3".
LABELS = _set("""
    step steps section eq equation part case question problem option chapter page figure fig
    table line exercise example theorem lemma version item note round no
""")
MONTHS = _set("""
    January February March April May June July August September October November December
    Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec
""")
# Words after an answer that begin an explanation: "7 since 3 + 4 = 7".
CLAUSES = _set("since because as so which where when if while not rather instead in per for")


def of(text: str) -> set[str]:
    """Returns the words of a text, in lower case."""
    return set(re.findall(r"[a-z]+", text.lower()))
