"""Style sheet and words of the benchmark's page; :mod:`.page` fills in the figures."""

from string import Template

KL_TEXTS = {
    "exact": "KL by enumeration of every response. The small numbers are n.",
    "levels": "The score has few values; the KL is that of the observed share of each. The small numbers are n.",
    "bound": "KL: upper bound log n − (n − 1)/n; a point truly lies there or further left. The small numbers are n.",
}

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--paper:#fff;--card:#f6f8fa;--warn:#fff8e6;
 --edge:#e69f00}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4b0;--line:#30363d;--paper:#0d1117;--card:#161b22;
 --warn:#2b2411}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:2rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 font-variant-numeric:tabular-nums}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .4rem}
h2{font-size:1.25rem;margin:2.6rem 0 .3rem}h3{font-size:1rem;margin:1.2rem 0 .5rem;overflow-wrap:anywhere}
p{margin:.3rem 0 .8rem;max-width:46rem}small,.facts,figcaption,dl{color:var(--soft);font-size:.82rem}
.flags{background:var(--warn);border:1px solid var(--edge);border-radius:10px;padding:.7rem 1rem .7rem 2rem;
 margin:1.2rem 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;min-width:50%}
th,td{padding:.4rem .7rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
td{white-space:nowrap}
thead th{vertical-align:bottom;font-weight:600;overflow-wrap:break-word;max-width:18rem}
thead small{display:block;font-weight:400}
th[scope=row]{text-align:left;font-weight:400;min-width:8rem;max-width:22rem;overflow-wrap:break-word}
.main th,.main td{padding:.4rem .4rem;font-size:.84rem;white-space:normal}
.main th[scope=row]{max-width:11rem;overflow-wrap:anywhere}
[title]{text-decoration:underline dotted var(--soft);text-underline-offset:3px;cursor:help}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:.8rem}
figure{margin:0;background:#fff;border:1px solid var(--line);border-radius:10px;padding:.7rem}
figure img{display:block;width:100%;height:auto;max-width:440px;margin:auto}
figcaption{color:#59636e;padding:.4rem .3rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .9rem;margin:.8rem 0}dt{font-weight:600}dd{margin:0}
.missing{color:var(--soft);font-style:italic}
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Reward-model benchmark</title><style>$style</style></head>
<body>
<h1>Reward-model benchmark</h1>
<p class="facts">$facts</p>
$flags
<div class="scroll">$table</div>
<dl>$legend</dl>
<h2>Pictures</h2>
<p>Left: on the dashed line a model is right as often as it says, below it it is too sure. Middle: the further right,
the better. Right, where the truth is known: the model's own score always rises with n; look whether gold follows it,
and where it turns.</p>
$pictures
<h2>Accuracy and calibration</h2>
<p>Every pair counts the same, a tie of scores one half. In brackets the 95 % interval that resamples prompts; hold the
pointer over a figure for Wilson's, which takes pairs as independent.</p>
<div class="scroll">$accuracy</div>
<h2>Length</h2>
<p>Lengths are in characters. A model that is right where the preferred response is longer and wrong where it is shorter
counts letters.</p>
<div class="scroll">$length</div>
<h2>Does it read the prompt?</h2>
<p>Accuracy with the prompt taken away, or replaced by another one. What is left is answered from the response
alone. A prompt longer than the model's context is cut on the left; a response never is.</p>
<div class="scroll">$prompts</div>
<h2>Harmless edits of the prompt</h2>
<p>Share of pairs whose order turns around, and how far scores move. A model whose vocabulary lacks the edited words
cannot stand firm, and a rule may refuse.</p>
<div class="scroll">$robustness</div>
<h2>Responses that nobody should prefer</h2>
<p>Share of items on which each of them scores above the response that was ranked best; equal scores do not.</p>
<div class="scroll">$probes</div>
<h2>The same text, the same score?</h2>
<p>Largest change of a score when its company changes, in standard deviations within a prompt.</p>
<div class="scroll">$determinism</div>
<h2>Speed and memory</h2>
<p>On this machine, tokenising included, padding not counted. Memory: by how much the first scoring raised the highest
resident memory of the process; 0 if loading needed more.</p>
<div class="scroll">$speed</div>
$comparisons
</body>
</html>
""")
