"""How the page of a report looks: one style sheet, light and dark, for phones and desktops."""

CSS = """\
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1b1f24; --soft: #5b626b; --line: #dfe2e6;
  --blue: #0072b2; --orange: #d55e00; --grey: #8c9196; --good: #00735a; --warn: #a34a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e6e9ec; --soft: #a3abb4; --line: #343a41;
    --blue: #5ab4e8; --orange: #f0945a; --grey: #7d858d; --good: #3fc29c; --warn: #f0a050;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere;
}
main { max-width: 76rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
header { border-left: .4rem solid var(--soft); padding: .1rem 0 .1rem 1rem; margin-bottom: 1.5rem; }
header.good { border-color: var(--good); }
header.warn { border-color: var(--warn); }
header p { margin: 0; color: var(--soft); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .15rem; }
header.good h1 { color: var(--good); }
header.warn h1 { color: var(--warn); }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
section { margin: 0 0 1.75rem; }
section > p { color: var(--soft); margin: .75rem 0 0; }
section > p b { color: var(--ink); font-weight: 600; }
ul { margin: 0 0 1.25rem; padding-left: 1.2rem; }
li { margin: .15rem 0; }
.tiles, .plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.tile, figure { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tile { padding: .9rem 1rem 1rem; }
.tile h2 { font-size: .95rem; font-weight: 500; color: var(--soft); margin: 0; }
.figures { margin: .2rem 0 .6rem; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.figures b { font-size: 1.7rem; }
.change { color: var(--soft); margin-left: .5rem; white-space: nowrap; }
.meter { height: .4rem; border-radius: .2rem; background: var(--line); overflow: hidden; }
.meter i { display: block; height: 100%; min-width: 2px; background: var(--blue); }
figure { margin: 0; padding: .5rem; align-self: start; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; justify-self: center; width: 100%; max-width: 38rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 38rem; margin: 0 auto; fill: currentColor; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td {
  padding: .35rem .75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: break-word;
}
thead th { border-top: 0; color: var(--soft); font-weight: 500; vertical-align: bottom; }
td:first-child {
  font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85rem; min-width: 9rem; overflow-wrap: anywhere;
}
th.n, td.n { text-align: right; }
td.n { white-space: nowrap; }
summary { cursor: pointer; margin-bottom: .5rem; }
summary h2 { display: inline; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; }
@media (max-width: 40rem) {
  h1 { font-size: 1.4rem; }
  th, td { padding: .3rem .35rem; }
  table { font-size: .8rem; }
  td:first-child { font-size: .75rem; min-width: 5.5rem; }
  .figures { font-size: 1.1rem; }
  .figures b { font-size: 1.5rem; }
  figure { padding: .25rem; }
}
@media print { details > * { display: block; } }
"""
