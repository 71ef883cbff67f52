"""The skeleton and style sheet of the report; ``agents.demo.report`` fills them. Nothing outside the file is needed."""

from string import Template

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--paper:#fff;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4b0;--line:#30363d;--paper:#0d1117;--card:#161b22}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:2rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 font-variant-numeric:tabular-nums}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .4rem}
h2{font-size:1.25rem;margin:2.8rem 0 .3rem}h3{font-size:1rem;margin:0}h4{font-size:.85rem;margin:0 0 .3rem}
p{margin:.3rem 0 1rem;max-width:46rem}small,.facts,.legend,figcaption{color:var(--soft);font-size:.82rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:.8rem;margin:1.4rem 0}
.tiles div,article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.9rem 1rem}
.tiles b{display:block;font-size:1.35rem;white-space:nowrap}.tiles b small{font-weight:400}
.tiles span{color:var(--soft);font-size:.85rem}
.bar{display:flex;gap:2px;height:12px;border-radius:6px;overflow:hidden}.bar i{flex-basis:0;min-width:2px}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin-top:.5rem;max-width:none}
.legend i,th i{display:inline-block;width:.65em;height:.65em;border-radius:2px;margin-right:.4em}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:.42rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th[scope=row]{text-align:left;font-weight:400;white-space:normal}th small{white-space:nowrap}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:.8rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:0 1.6rem}
.pair section{display:grid;grid-template-rows:subgrid;grid-row:span 3;min-width:0}
figure{margin:0;background:#fff;border:1px solid var(--line);border-radius:10px;padding:.7rem;color:#1f2328}
figure img{display:block;width:100%;height:auto;max-width:560px;margin:auto}
figcaption{color:#59636e;padding:.4rem .3rem 0}
article{margin:.9rem 0}.prompt{font-size:1.05rem;margin:.1rem 0 .8rem}.prompt:before{content:"“"}
.prompt:after{content:"”"}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(205px,1fr));gap:.8rem}
.answer{border-top:4px solid;background:var(--paper);border-radius:4px;padding:.6rem .75rem;overflow-wrap:anywhere}
.answer p{margin:0 0 .5rem}.answer span{white-space:nowrap;margin-right:.6em}
.missing{color:var(--soft);font-style:italic}pre{overflow-x:auto;font-size:.8rem;color:var(--soft)}
@media(max-width:560px){body{padding:1.2rem .8rem 3rem}th,td{padding:.4rem .35rem}table{font-size:.85rem}
 td small{display:block}thead th{white-space:normal;vertical-align:bottom}thead i{display:block;margin:0 0 .2em auto}
 .tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:.5rem}
 .tiles div{padding:.6rem .7rem}.tiles b{font-size:1.05rem}}
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>RLHF report</title><style>$style</style></head>
<body>
<h1>RLHF, step by step</h1>
<p>A base model learns to answer from demonstrations (SFT), a reward model learns from rankings what people prefer,
and PPO learns to write answers that the reward model likes while it stays close to SFT.</p>
<p class="facts">$facts</p>
<div class="tiles">$tiles</div>
$seconds
<h2>Results</h2>
<p>Means over held-out prompts, with 95 % intervals (↑ more is better, ↓ less). The gold score is that of the
true judge, which training sees only through noisy rankings: look whether it rises together with the reward model's.</p>
<div class="scroll">$table</div>
<h2>Learning curves</h2>
<p>PPO on training prompts; dashed lines are held-out means of other stages. Look for gold that rises with the score:
if the score climbs on while gold falls, the reward model is being exploited.</p>
<div class="pictures">$curves</div>
<div class="pair"><section><h2>Can the reward model be trusted?</h2>
<p>Pairs are grouped by how sure the reward model is. On the diagonal it is right as often as it says;
below it, it is too sure of itself.</p>
$calibration</section>
<section><h2>What a step away from SFT buys</h2>
<p>The higher and the further left, the better: more gold for less change. A curve that bends down has gone too far.</p>
$frontier</section></div>
<h2>The same prompts, answered by each stage</h2>
<p>Look whether the helpful answer becomes right, the harmful request is declined, and the requested tone is kept.</p>
$samples
<details><summary>Settings of this run</summary><pre>$config</pre></details>
</body>
</html>
""")
