"""How all pages look: on phones and screens, light and dark, and on paper.

Key idea: colours are named once, for light and for dark; paper is always light. A plot has padding rather than margins,
so that its labels, which lie outside the axes, stay on its page.
"""

CSS = """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d5dae0;--bar:#2563b8;
--other:#b3500b;--good:#176639;--bad:#b3261e;--mark:#ffe08a}*{box-sizing:border-box;margin:0}
@media screen and (prefers-color-scheme:dark){:root{--page:#121518;--card:#1b1f23;--ink:#e8eaed;--soft:#a9b1bb;
--line:#3b424a;--bar:#7fb0ff;--other:#f2a560;--good:#74d29c;--bad:#ff8f86;--mark:#6a5200}}
body{margin:0 auto;padding:1rem;max-width:84rem;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}h1{font-size:1.25rem;margin-bottom:1rem}
h2{font-size:1rem}small,dt,th,.note{color:var(--soft);font-size:.85rem}p,summary{margin:.2rem 0}
.cards,.figures,.stack{display:grid;gap:1rem;align-content:start;grid-template-columns:minmax(0,1fr)}
.card,.figures div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem 1rem;min-width:0}
.verdict{border-left:6px solid var(--soft);margin-bottom:1rem}.verdict.good{border-color:var(--good)}
.verdict.bad{border-color:var(--bad)}.good strong{color:var(--good)}.bad strong{color:var(--bad)}
.verdict p:first-of-type{font-size:1.15rem}.figures small{display:block}
.figures{gap:.5rem;margin:1rem 0;grid-template-columns:repeat(2,minmax(0,1fr))}
.figures dd{font-size:1.25rem;line-height:1.35;font-variant-numeric:tabular-nums}dd{margin-bottom:.4rem}
.plot{display:block;overflow:visible;box-sizing:content-box;width:calc(100% - 72px);padding:28px 18px 46px 54px}
.plot.rows{width:calc(100% - 28px);padding:8px 14px 46px}.plot.aligned{padding-top:6px}
.plot text{font-size:12px;fill:var(--soft)}.middle{text-anchor:middle}.end{text-anchor:end}
.plot .name{fill:var(--ink);stroke:var(--card);stroke-width:4;paint-order:stroke}.hit{fill:transparent}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}g:hover>.hit{fill:var(--line);fill-opacity:.5}
.bar,.dot{fill:var(--bar)}.pale{fill:var(--bar);fill-opacity:.35}.range{stroke:var(--ink);stroke-width:2}
.global,.below{fill:var(--other)}.hollow{fill:var(--card);stroke:var(--bar);stroke-width:1.5}
.kept{fill:var(--card);stroke:var(--bar);stroke-width:1.5;stroke-dasharray:4 2}.kept.global{stroke:var(--other)}
.limit{stroke:var(--bad);stroke-width:2;stroke-dasharray:6 4}.histogram .bar{stroke:var(--card);stroke-width:.5}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.4rem .8rem .4rem 0;border-top:1px solid var(--line)}
.numbers *{font-size:.82rem;padding-right:.5rem}.numbers td+td,.numbers th+th{text-align:right;white-space:nowrap}
pre,.text{font:13px/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap}
pre{white-space:pre}pre,.numbers{overflow-x:auto;overflow-wrap:normal}ol{padding:0}
li{display:flex;gap:.75rem;justify-content:space-between}li>span,.number{white-space:nowrap}.actual>bdi{font-weight:700;text-decoration:underline}
mark{background:var(--mark);color:inherit;font-weight:700;border-radius:3px;padding:0 2px;outline:1px solid var(--soft)}
@media screen and (max-width:599px){.worst tr,.worst td{display:block}.worst td+td{border:0}
.domains tr>:nth-child(4){display:none}}@media print,(min-width:600px){.top{width:24%}
.figures{grid-template-columns:repeat(4,1fr)}}@media print,(min-width:800px){
.cards,.stack{grid-template-columns:repeat(2,minmax(0,1fr))}.wide,.stack{grid-column:1/-1}}
@media screen and (min-width:1250px){
.cards{grid-template-columns:repeat(3,minmax(0,1fr))}.stack{grid-column:auto;grid-template-columns:minmax(0,1fr)}
.figures{grid-template-columns:repeat(8,1fr)}.about{columns:2}.about div{break-inside:avoid}}
@page{margin:12mm}@media print{body{background:none;max-width:none;padding:0}mark{print-color-adjust:exact}
.card,.card>.note,tr,.plot,.about div{break-inside:avoid}.wide{break-inside:auto}h2,.card>.note{break-after:avoid}
details:not([open]){display:none}.numbers{overflow:visible;overflow-wrap:anywhere}
.numbers tr>*{font-size:7.5pt;white-space:normal}}
"""
