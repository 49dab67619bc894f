"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  root.classList.add("js");
  const $ = (selector, inside = document) => inside.querySelector(selector);
  const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // What the reader has chosen, kept over a reload; a page in a mail may have no storage.
  const key = "lorabench " + location.pathname;
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(key)) || {}; } catch { /* none */ }
  const keep = (name, value) => {
    kept[name] = value;
    try { sessionStorage.setItem(key, JSON.stringify(kept)); } catch { /* none */ }
  };

  // --- light and dark ---
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  if (kept.theme) root.dataset.theme = kept.theme;

  // --- figures ---
  const colours = () => {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue(name).trim();
    const line = of("--line");
    const axis = { gridcolor: of("--grid"), linecolor: line, tickcolor: line, zerolinecolor: line };
    return {
      axis, text: of("--text"), raised: of("--raised"), line,
    };
  };
  // The legend lies below, and the figure grows with it.
  const withLegend = (traces, layout, width) => {
    const names = traces.filter((one) => one.name && one.showlegend !== false).map((one) => one.name);
    if (names.length < 2) return { ...layout, showlegend: false };
    const each = Math.max(...names.map((name) => name.length)) * 7 + 56;
    const rows = Math.ceil(names.length / Math.max(1, Math.floor((width - 80) / each)));
    const added = 22 * rows + 10;
    return {
      ...layout, height: layout.meta.height + added,
      margin: { ...layout.margin, b: layout.margin.b + added },
      legend: { ...layout.legend, maxheight: added, entrywidth: each - 44 },
    };
  };
  // On a phone long labels are broken into lines, and the figure grows with them.
  const narrowed = (layout, width) => {
    const texts = layout.yaxis?.ticktext;
    if (width >= 600 || !texts) return layout;
    const broken = texts.map((text) => {
      const lines = [""];
      text.split(" ").forEach((word) => {
        const last = lines[lines.length - 1];
        if (last && last.length + word.length >= 16) lines.push(word);
        else lines[lines.length - 1] = last ? `${last} ${word}` : word;
      });
      return lines;
    });
    const most = Math.max(...broken.map((lines) => lines.length));
    const height = layout.meta.height + 14 * (most - 1) * texts.length;
    return {
      ...layout, height, meta: { ...layout.meta, height },
      yaxis: { ...layout.yaxis, ticktext: broken.map((lines) => lines.join("<br>")), tickfont: { size: 11 } },
    };
  };
  const themed = (layout) => {
    const { axis, text, raised, line } = colours();
    const found = {
      ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, color: text, family: "system-ui, sans-serif" },
      hoverlabel: { ...layout.hoverlabel, bgcolor: raised, bordercolor: line, font: { color: text } },
      autosize: true,
    };
    for (const name of ["xaxis", "yaxis"]) found[name] = { ...layout[name], ...axis };
    if (innerWidth < 600) found.legend = { ...layout.legend, font: { size: 11 } };
    return found;
  };
  const settings = { displaylogo: false, showSendToCloud: false, responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const chosenOf = (group) => {
    const figures = data.figures[group];
    return figures.find(({ name }) => name === kept["figure " + group]) || figures[0];
  };
  // Zoom and legend, by names: a page that is written again may have more settings.
  const viewOf = (group) => `view ${group} ${chosenOf(group).name}`;
  const labelsOf = (traces) => {
    const named = {};  // a band has the name of its curve
    traces.forEach(({ legendgroup, name, showlegend }) => {
      if (legendgroup && showlegend !== false) named[legendgroup] = name;
    });
    const seen = {};  // labels that are cut may be alike
    return traces.map(({ legendgroup, name }, i) => {
      const label = named[legendgroup] || name;
      const alike = seen[label] ||= [];
      const own = legendgroup || `trace ${i}`;
      if (!alike.includes(own)) alike.push(own);
      return `${label} ${alike.indexOf(own)}`;
    });
  };
  const asKept = (group, traces) => {
    const { shown = {} } = kept[viewOf(group)] || {};
    const labels = labelsOf(traces);
    return traces.map((one, i) => (labels[i] in shown ? { ...one, visible: shown[labels[i]] } : one));
  };
  // Behind the whole figure, to which a double click leads back.
  const zoom = (place) => {
    const ranges = Object.entries(kept[viewOf(place.dataset.group)]?.ranges || {}).filter(([, range]) => range);
    if (ranges.length) Plotly.relayout(place, Object.fromEntries(ranges.map(([axis, range]) => [`${axis}.range`, range])));
  };
  const keepView = (place, change) => {
    const name = viewOf(place.dataset.group);
    keep(name, { ...kept[name], ...change });
  };
  const draw = (place) => {
    if (!window.Plotly) return;
    const { group } = place.dataset;
    const { data: traces, layout } = chosenOf(group).figure;
    const width = place.clientWidth;
    const own = structuredClone(traces);
    // The cells of a heat map have their numbers.
    if (width < 600) own.forEach((one) => { if (one.type === "heatmap") one.showscale = false; });
    const placed = withLegend(traces, themed(narrowed(layout, width)), width);
    Plotly.react(place, asKept(group, own), placed, settings);
    zoom(place);
    if (!place.dataset.drawn) {
      place.removeAllListeners("plotly_relayout");
      place.removeAllListeners("plotly_restyle");
      place.on("plotly_relayout", (change) => {
        const axes = ["xaxis", "yaxis"].filter((axis) => Object.keys(change).some((key) => key.startsWith(axis)));
        const ranges = { ...kept[viewOf(group)]?.ranges };
        axes.forEach((axis) => {
          const { autorange, range } = place.layout[axis];
          ranges[axis] = autorange ? null : [...range];
        });
        if (axes.length) keepView(place, { ranges });
      });
      place.on("plotly_restyle", () => {
        const labels = labelsOf(place.data);
        keepView(place, { shown: Object.fromEntries(labels.map((label, i) => [label, place.data[i].visible ?? true])) });
      });
    }
    place.dataset.drawn = "1";
  };
  const drawOpen = (again) => $$("[role=tabpanel].open .figure").forEach((place) => {
    if (again || !place.dataset.drawn) draw(place);
  });
  $$("select[data-of]").forEach((select) => {
    const figures = data.figures[select.dataset.of];
    figures.forEach(({ name }) => select.append(new Option(name, name)));
    select.value = chosenOf(select.dataset.of).name;
    select.parentElement.hidden = figures.length < 2;
    select.addEventListener("change", () => {
      keep("figure " + select.dataset.of, select.value);
      draw($(`.figure[data-group="${select.dataset.of}"]`));
    });
  });
  const rethemed = () => {
    $$(".figure").forEach((place) => delete place.dataset.drawn);
    drawOpen();
  };
  $("#theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    keep("theme", root.dataset.theme);
    rethemed();
  });
  dark.addEventListener("change", rethemed);

  // --- tabs ---
  const tabs = $$("[role=tab]");
  const open = (name, isNew = true) => {
    const tab = tabs.find((one) => one.getAttribute("aria-controls") === name) || tabs[0];
    tabs.forEach((one) => {
      const is = one === tab;
      one.setAttribute("aria-selected", is);
      one.tabIndex = is ? 0 : -1;
      document.getElementById(one.getAttribute("aria-controls")).classList.toggle("open", is);
    });
    tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    if (isNew) {
      keep("tab", tab.getAttribute("aria-controls"));
      try { history.replaceState(null, "", "#" + kept.tab); } catch { /* a page in a frame */ }
    }
    drawOpen();
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      open(next.getAttribute("aria-controls"));
      next.focus();
    });
  });

  // --- tables that sort ---
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    return String(a).localeCompare(String(b));
  };
  const sort = (table, column, direction) => {
    const body = table.tBodies[0];
    const value = (row) => row.cells[column].dataset.sort;
    const rows = [...body.rows].map((row, i) => [row, i]);
    rows.sort(([a, i], [b, k]) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined) || i - k;
      return direction * compare(x, y) || i - k;
    });
    body.append(...rows.map(([row]) => row));
    $$("thead th", table).forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  };
  $$("table.sortable").forEach((table) => {
    const place = "sort " + table.closest("section").id;
    const heads = $$("thead th", table);
    heads.forEach((head, column) => {
      $("button", head).addEventListener("click", () => {
        const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        sort(table, column, direction);
        keep(place, [head.textContent, direction]);
      });
    });
    const [text, direction] = kept[place] || [];
    const column = heads.findIndex((head) => head.textContent === text);
    if (column >= 0) sort(table, column, direction);
  });

  // --- examples ---
  const found = data.examples;
  if (found && found.settings) {
    const [first, second, which, needle] = ["first", "second", "which", "needle"]
      .map((id) => document.getElementById(id));
    found.settings.forEach((label, i) => {
      first.append(new Option(label, i));
      second.append(new Option(label, i));
    });
    const kinds = found.isRight
      ? [["gained", "wrong to right"], ["lost", "right to wrong"], ["changed", "all that changed"], ["all", "all"]]
      : [["gained", "better"], ["lost", "worse"], ["changed", "all that changed"], ["all", "all"]];
    kinds.forEach(([value, text]) => which.append(new Option(text, value)));
    const chosen = kept.examples || {};
    const placeOf = (label, otherwise) => {
      const place = found.settings.indexOf(label);
      return place < 0 ? otherwise : place;
    };
    first.value = placeOf(chosen.first, found.first);
    second.value = placeOf(chosen.second, found.second);
    which.value = chosen.which || "gained";
    needle.value = chosen.needle || "";
    let count = 50;
    const cell = (text, kind, small) => {
      const made = document.createElement("td");
      made.textContent = text;
      if (kind) made.className = kind;
      if (small) made.append(Object.assign(document.createElement("small"), { textContent: small }));
      return made;
    };
    const written = (setting, i) => {
      const place = found.written[setting][i];
      return place < 0 ? "" : found.texts[place];
    };
    const scored = (setting, i) => {
      const value = found.scores[setting][i];
      if (value === null) return "not scored";
      if (!found.isRight) return value.toPrecision(4);
      const [seeds, right] = [found.seeds[setting], value * found.seeds[setting]];
      if (seeds === 1) return value >= 0.5 ? "right" : "wrong";
      // A seed without a score of this example: the rest is a share.
      if (Math.abs(right - Math.round(right)) > 1e-3) return `right in ${Math.round(100 * value)}% of the seeds`;
      return `right in ${Math.round(right)} of ${seeds} seeds`;
    };
    const kindOf = (setting, i) => {
      const value = found.own[setting][i];
      return !found.isRight || value === null ? "" : value >= 0.5 ? "right" : "wrong";
    };
    const show = () => {
      const [a, b] = [Number(first.value), Number(second.value)];
      const sign = found.higher ? 1 : -1;
      const half = (x) => x >= 0.5;
      const word = needle.value.toLowerCase();
      const rows = [];
      found.examples.forEach(([id, prompt, completion], i) => {
        const [x, y] = [found.scores[a][i], found.scores[b][i]];
        if (x === null || y === null) return;
        const gained = found.isRight ? !half(x) && half(y) : sign * (y - x) > 0;
        const lost = found.isRight ? half(x) && !half(y) : sign * (y - x) < 0;
        const kind = which.value;
        const wanted = kind === "all" || (kind === "gained" && gained) || (kind === "lost" && lost)
          || (kind === "changed" && (gained || lost));
        const texts = [id, prompt, completion, written(a, i), written(b, i)].join("\n").toLowerCase();
        if (wanted && texts.includes(word)) rows.push([Math.abs(y - x), i]);
      });
      rows.sort((one, other) => other[0] - one[0] || one[1] - other[1]);
      const names = found.isRight ? ["from wrong to right", "from right to wrong"] : ["better", "worse"];
      document.getElementById("counted").textContent =
        `${found.gained[a][b]} of ${found.both[a][b]} test examples went ${names[0]} and ${found.gained[b][a]} ${names[1]} `
        + `by ${found.metric}`
        + (found.isRight ? ", right being right in at least half of the seeds" : "")
        + (!found.by ? "." : `. What was written (${found.by}) is that of `
          + (found.seed === null ? "one run of each; they share no seed." : `seed ${found.seed}, and its colour says whether it is right.`));
      const table = document.getElementById("changed");
      const head = document.createElement("tr");
      ["prompt", "reference", found.settings[a], found.settings[b]].forEach((name) =>
        head.append(Object.assign(document.createElement("th"), { textContent: name, scope: "col" })));
      table.tHead.replaceChildren(head);
      table.tBodies[0].replaceChildren(...rows.slice(0, count).map(([, i]) => {
        const [id, prompt, completion] = found.examples[i];
        const row = document.createElement("tr");
        row.append(cell(prompt || id), cell(completion));
        for (const setting of [a, b]) {
          const [text, own] = [scored(setting, i), written(setting, i)];
          row.append(cell(own || text, kindOf(setting, i), own ? text : ""));
        }
        return row;
      }));
      if (!rows.length) {
        const row = document.createElement("tr");
        const none = cell("no such example");
        none.colSpan = 4;
        row.append(none);
        table.tBodies[0].append(row);
      }
      document.getElementById("more").hidden = rows.length <= count;
    };
    const chose = () => {
      count = 50;
      keep("examples", {
        first: found.settings[first.value], second: found.settings[second.value],
        which: which.value, needle: needle.value,
      });
      show();
    };
    [first, second, which].forEach((one) => one.addEventListener("change", chose));
    needle.addEventListener("input", chose);
    document.getElementById("more").addEventListener("click", () => { count += 200; show(); });
    show();
  }

  // --- texts that were unfolded ---
  const folds = $$("details");
  const nameOf = (fold) => `${fold.closest("tr")?.cells[0].textContent} ${fold.closest("td")?.cellIndex} ${$("summary", fold).textContent}`;
  folds.forEach((fold) => {
    fold.open = (kept.unfolded || []).includes(nameOf(fold));
    fold.addEventListener("toggle", () => keep("unfolded", folds.filter((one) => one.open).map(nameOf)));
  });

  // --- paper has no tabs ---
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    $$(".figure").forEach(draw);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    rethemed();
  });

  const named = location.hash.slice(1);
  open(named || kept.tab || "verdicts", false);
  addEventListener("hashchange", () => open(location.hash.slice(1)));

  // --- a page that is written again while a sweep runs ---
  $("#again").addEventListener("click", () => {
    keep("made", null);
    location.reload();
  });
  if (data.reload) {
    if (kept.place) scrollTo(0, kept.place);
    // How often it was loaded as it is: a tab that nobody looks at does not load.
    const loads = kept.made?.text === data.made ? kept.made.loads + 1 : 0;
    keep("made", { text: data.made, loads });
    const timer = setInterval(() => {
      // Not under a reader's hands, and not where nobody looks.
      const busy = ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
      if (busy || document.hidden) return;
      if (loads > Math.max(6, data.patience / data.reload)) {
        clearInterval(timer);
        $("#stale").hidden = false;
        return;
      }
      keep("place", scrollY);
      location.reload();
    }, 1000 * data.reload);
  }
})();
