"""Short texts of several kinds, written for this project, on which tokenizers are compared (`jobs.tokenizer_eval`)."""

_PROSE = """\
The ferry left an hour late, which nobody on the quay seemed to mind. A baker had come down with two trays of rolls,
and the captain, who didn't usually speak before noon, told the story of the winter when the strait froze and people
walked to the mainland with their cows. "You could hear the ice thinking," he said. By the time the ropes were cast
off, the fog had thinned to a kind of pale smoke, and the lighthouse stood in it like somebody waiting to be asked a
question. We've crossed a hundred times since then; I'm still not sure whether he had made it up.

"And you?" she asked, after a while. "Did you ever go back?" He didn't answer at once. There was the garden, and the
gate that wouldn't close, and his brother's boots by the door, as if it were any Sunday. "No," he said. "Somebody had to
look after the bees."
"""

_NEWS = """\
HARBOUR BRIDGE TO CLOSE FOR SIX WEEKS -- The city council voted 31-14 on Tuesday to shut the eastern lanes of the
Harbour Bridge from March 3, after engineers found cracks in two of its 118 bearings. Traffic will be diverted through
the tunnel, where tolls are to be waived between 6 a.m. and 9 a.m., a spokeswoman for the transport department said.

Shares of the operator fell 4.2 per cent to $17.35. "We don't expect the repairs to exceed the $12 million we've set
aside," Chief Executive Maria Okonkwo-Lindqvist told reporters. Opposition members, who had called for an independent
inquiry as early as last November, described the decision as "too little, and about two years too late". Commuters'
groups said they would decide on Friday whether to go to court.
"""

_SCIENCE = """\
Mitochondria are the organelles in which most of a eukaryotic cell's adenosine triphosphate (ATP) is synthesised.
Protons pumped across the inner membrane by complexes I, III and IV of the respiratory chain return through ATP
synthase, and the free energy of that gradient, about 20 kJ/mol, drives phosphorylation of ADP.

The samples were annealed at 450 °C for 12 h under argon and characterised by X-ray diffraction (Cu Kα, λ = 1.5406 Å).
Lattice parameters obtained by Rietveld refinement differed by less than 0.3% from those of Chen et al. [14]; the band
gap, 1.82 ± 0.04 eV, was estimated from diffuse reflectance. Reaction with dilute H2SO4 released CO2 quantitatively:
CaCO3 + 2 H⁺ → Ca²⁺ + H2O + CO2. Among 1,204 participants (mean age 57.3 years, 48% female), treatment reduced
systolic blood pressure by 6.1 mmHg (95% CI 4.2 to 8.0, p < 0.001), irrespective of baseline cholesterol.
"""

_MATHEMATICS = """\
Theorem 2.4. Let f: [a, b] → R be continuous and differentiable on (a, b). If f'(x) = 0 for every x in (a, b), then f
is constant. Proof. Suppose there are x < y with f(x) ≠ f(y). By the mean value theorem, (f(y) − f(x)) / (y − x) =
f'(c) for some c between x and y, hence f'(c) ≠ 0, a contradiction. ∎

A train covers 180 km in 2 hours and 15 minutes. What is its average speed? We divide 180 by 2.25 and obtain 80, so
the train travels at 80 km/h. If n is odd, then n = 2k + 1 and n² = 4k² + 4k + 1 = 4(k² + k) + 1, which leaves the
remainder 1 when divided by 4. The roots of x² − 5x + 6 = 0 are x₁ = 2 and x₂ = 3; their sum is 5, their product 6.
For all ε > 0 there is an N such that |aₙ − a| < ε whenever n ≥ N; the series Σ 1/n² converges to π²/6, while Σ 1/n
diverges.
"""

_CODE = '''\
from dataclasses import dataclass


@dataclass
class Interval:
    """A half-open range [start, stop) of positions."""

    start: int
    stop: int

    def overlaps(self, other: "Interval") -> bool:
        return self.start < other.stop and other.start < self.stop


def merge(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (i.start, i.stop)):
        if merged and merged[-1].stop >= interval.start:
            merged[-1].stop = max(merged[-1].stop, interval.stop)
        else:
            merged.append(Interval(interval.start, interval.stop))
    return merged


if __name__ == "__main__":
    print(merge([Interval(0, 3), Interval(2, 5), Interval(9, 12)]))  # two intervals remain

/* the same idea in C */
static size_t merge_ranges(struct range *r, size_t n) {
    size_t out = 0;
    for (size_t i = 1; i < n; i++) {
        if (r[out].stop >= r[i].start) { if (r[i].stop > r[out].stop) r[out].stop = r[i].stop; }
        else { r[++out] = r[i]; }
    }
    return n ? out + 1 : 0;
}
'''

_LANGUAGES = """\
Поезд пришёл вечером, когда на площади уже зажгли фонари, и никто не встретил нас, кроме старой собаки.
火车在傍晚到达，广场上的灯已经亮了。没有人来接我们，只有一条老狗坐在门口。
夕方に列車が着いたとき、広場にはもう明かりがともっていた。迎えに来たのは年老いた犬だけだった。
저녁에 기차가 도착했을 때 광장에는 이미 불이 켜져 있었고, 늙은 개 한 마리만 우리를 맞아 주었다.
وصل القطار مساءً وكانت مصابيح الساحة مضاءة، ولم يستقبلنا أحد سوى كلب عجوز.
शाम को जब रेलगाड़ी पहुँची तो चौक की बत्तियाँ जल चुकी थीं और हमें लेने केवल एक बूढ़ा कुत्ता आया था।
Το τρένο έφτασε το βράδυ· στην πλατεία είχαν ήδη ανάψει τα φώτα και μας περίμενε μόνο ένας γέρικος σκύλος.
Le train arriva le soir ; déjà les réverbères étaient allumés, et seul un vieux chien nous attendait à l'entrée. 🐕🌙
"""

_NUMBERS = """\
date,station,reading,error
2024-01-31,17,1013.25,0.05
2024-02-29,4,998.7,0.12
2025-11-08,1204,1024.00,0.008
pi = 3.14159265358979, e = 2.718281828459045, c = 299792458 m/s, h = 6.62607015e-34 J s
7 * 8 = 56; 123 + 4567 = 4690; 1000000 / 64 = 15625; 2**31 - 1 = 2147483647; 19.5% of 240 is 46.8
+1 (555) 010-9977, 192.168.0.254:8080, 0x7fffffff, 0b101101, v2.13.0, 09:45:00, 1,234,567.89
"""

_MARKUP = r"""
## Least squares

Given points $(x_i, y_i)$, we look for the line that **minimises** the sum of squares

$$ E(a, b) = \sum_{i=1}^{n} \left( y_i - a x_i - b \right)^2 . $$

1. Set both derivatives to zero: $\partial E / \partial a = 0$ and $\partial E / \partial b = 0$.
2. Solve the *normal equations*:

\begin{align}
  a &= \frac{\sum_i (x_i - \bar{x})(y_i - \bar{y})}{\sum_i (x_i - \bar{x})^2}, \\
  b &= \bar{y} - a \bar{x}.
\end{align}

| estimator | bias | variance |
| --- | --- | --- |
| `ols` | 0 | $\sigma^2 (X^\top X)^{-1}$ |
| [ridge](https://example.org/ridge?lambda=0.1#proof) | $\mathcal{O}(\lambda)$ | smaller |

> Note: the formula fails when all $x_i$ are equal, see `fit(..., check=True)`.
"""

SAMPLES = {
    "prose": _PROSE,
    "news": _NEWS,
    "science": _SCIENCE,
    "mathematics": _MATHEMATICS,
    "code": _CODE,
    "numbers": _NUMBERS,
    "Markdown and LaTeX": _MARKUP,
    "other languages": _LANGUAGES,
}
