"""How long a folder of 5,000 pairs takes to open in a browser, and its next page.

`python tests/measure_view.py nbs/results/view_5000_pairs/seconds.json` renders the pairs into a temporary
folder, opens them with Chromium, and writes the seconds with the machine they were taken on."""
import os
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Error, sync_playwright
from test_app import BROWSER, FLAGS, Served, enter, many

from medsyn.core import hardware, save_json, versions
from medsyn.pages.review import open_site

N = 5000
VISIBLE = """document.readyState === 'complete' && [...document.querySelectorAll('.tile img')]
    .filter(o => o.getBoundingClientRect().top < innerHeight).every(o => o.complete && o.naturalWidth > 0)"""

def seconds(action):
    "How long something takes, and how much of it the server computes: on a busy machine the two differ."
    start, cpu = time.perf_counter(), time.process_time()
    action()
    return dict(seconds=round(time.perf_counter() - start, 2), server=round(time.process_time() - cpu, 2))

def until_true(page, expression):
    "Wait for something in a page that may open itself again meanwhile."
    while True:
        try:
            if page.evaluate(expression): return
        except Error as error:
            if 'context was destroyed' not in str(error): raise
        page.wait_for_timeout(50)

def shown(page):
    "Wait until every thumbnail in the window is there."
    until_true(page, VISIBLE)

def measure(folder):
    "Seconds of each step, by its name."
    found, sites = {}, []
    found['the server finds the pairs'] = seconds(lambda: sites.append(open_site(folder)))
    with Served(sites[0]) as server, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        enter(browser, server.address(''), server.site.token, path='/static/app.css').close()   # warm up
        pages = []
        def visit(): shown(pages.append(enter(browser, server.address(''), server.site.token)) or pages[-1])
        found['first page, first visit'] = seconds(visit)
        found['first page, second visit'] = seconds(visit)
        page = pages[-1]
        def scroll():
            page.mouse.wheel(0, 20_000)
            page.wait_for_timeout(50)
            shown(page)
        found['scrolled to its end'] = seconds(scroll)
        def following():
            page.click('[rel=next]')
            shown(page)
        found['next page'] = seconds(following)
        def sorted_by_size():
            page.select_option('#sort', 'size')
            page.click('.bar button[type=submit]')
            page.wait_for_url('**sort=size**')
            shown(page)
        found['sorted by size, first time: the page answers'] = seconds(sorted_by_size)
        measured = "document.readyState === 'complete' && !document.getElementById('measuring')"
        found['and every mask is measured in the background'] = seconds(lambda: until_true(page, measured))
        found['sorted by size, again'] = seconds(lambda: (page.reload(), shown(page)))
        browser.close()
    return found

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as tmp:
        found = measure(many(Path(tmp), N))
    load = f'load average {os.getloadavg()[0]:.0f}, niceness {os.nice(0)}'
    about = f'{N} rendered pairs of 32 px, Chromium, {hardware()}, {load}'
    command = 'python tests/measure_view.py nbs/results/view_5000_pairs/seconds.json'
    save_json(sys.argv[1], dict(about=about, seconds=found, versions=versions(), command=command))
    print(about, found)
