"""Short texts of several kinds, written for this project, on which tokenizers are compared (`jobs.tokenizer_eval`)."""

_PROSE = """\
The ferry left an hour late, which nobody on the quay seemed to mind. A baker had come down with two trays of rolls,
and the captain, who didn't usually speak before noon, told the story of the winter when the strait froze and people
walked to the mainland with their cows. "You could hear the ice thinking," he said. By the time the ropes were cast
off, the fog had thinned to a kind of pale smoke, and the lighthouse stood in it like somebody waiting to be asked a
question. We've crossed a hundred times since then; I'm still not sure whether he had made it up.

Nutrition, transport and heating account for most of a household's emissions. Researchers therefore measured all three
over five years, in cities as well as in rural districts, and found that the differences between neighbours were larger
than the differences between countries.
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

_SCRIPTS = """\
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
    "English prose": _PROSE,
    "code": _CODE,
    "other scripts": _SCRIPTS,
    "numbers": _NUMBERS,
    "Markdown and LaTeX": _MARKUP,
}
