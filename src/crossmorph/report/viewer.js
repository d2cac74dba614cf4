"use strict";
// The viewer of a registration report. Volumes are bytes with R fastest, then A, then S; 0 means "says nothing".
// Every plane is drawn as radiologists look at it: right or front on the left, front or head up.

(async () => {
  const $ = id => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const AXES = ["R", "A", "S"], OPPOSITE = ["L", "P", "I"], FIELDS = 8, DIM = 0.45, FLICKER_MS = 500;
  const PLANES = [
    { name: "axial", across: 0, up: 1, through: 2 },
    { name: "coronal", across: 0, up: 2, through: 1 },
    { name: "sagittal", across: 1, up: 2, through: 0 },
  ];

  // -- volumes ----------------------------------------------------------------------------------------------

  async function bytes(text) {
    const packed = Uint8Array.from(atob(text), c => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }
  const volume = async text => (text === null ? null : new Uint8Array(await bytes(text)));

  const shape = data.shape, fieldShape = data.fieldShape;
  const strides = [1, shape[0], shape[0] * shape[1]];
  const fieldStrides = [1, fieldShape[0], fieldShape[0] * fieldShape[1]];
  const fieldSize = fieldStrides[2] * fieldShape[2];
  const ratio = shape.map((n, axis) => fieldShape[axis] / n);

  let fixed, movings, labels, jacobian, confidence, steps;
  try {
    fixed = await volume(data.fixed);
    movings = await Promise.all(data.movings.map(async m => ({ before: await volume(m.before), after: await volume(m.after) })));
    labels = data.labels && await Promise.all(data.labels.map(volume));
    jacobian = await volume(data.jacobian);
    confidence = await volume(data.confidence);
    steps = data.displacement === null ? null : new Int16Array(await bytes(data.displacement));
  } catch (error) {
    $("trouble").textContent = "This browser cannot unpack the volumes (it needs DecompressionStream). The still pictures show the same.";
    $("trouble").hidden = false;
    return;
  }

  // Longest displacement first, so that its colours reach from 0 to it.
  let lengths = null, longest = 0.001;
  if (steps) {
    const mm = new Float32Array(fieldSize);
    for (let n = 0; n < fieldSize; n++) {
      mm[n] = data.stepMm * Math.hypot(steps[n], steps[n + fieldSize], steps[n + 2 * fieldSize]);
      longest = Math.max(longest, mm[n]);
    }
    lengths = Uint8Array.from(mm, value => 1 + Math.round((254 * value) / longest));
  }

  const OVERLAYS = {};
  if (steps) {
    OVERLAYS.jacobian = { name: "volume change (Jacobian)", codes: jacobian, colours: data.growthColours, low: "half", high: "double, larger in the moving image" };
    OVERLAYS.displacement = { name: "displacement", codes: lengths, colours: data.lengthColours, low: "0", high: `${longest.toFixed(1)} mm` };
  }
  if (confidence) {
    OVERLAYS.confidence = { name: "expected error", codes: confidence, colours: data.lengthColours, low: "0", high: `${data.confidenceMaxMm.toFixed(1)} mm` };
  }

  // -- state ------------------------------------------------------------------------------------------------

  const state = {
    at: [...data.center], moving: 0, when: "after", mode: "blend", blend: 0.5, overlay: "none", strength: 0.55,
    lines: false, contours: false, marks: false,
  };
  let timer = null;

  const index = at => at[0] + strides[1] * at[1] + strides[2] * at[2];
  const world = at => at.map((n, axis) => data.origin[axis] + data.spacing * n);
  const voxel = mm => mm.map((x, axis) => (x - data.origin[axis]) / data.spacing);
  const fieldCell = (n, axis) => Math.min(fieldShape[axis] - 1, Math.floor((n + 0.5) * ratio[axis]));
  const fieldIndex = at => at.reduce((sum, n, axis) => sum + fieldStrides[axis] * fieldCell(n, axis), 0);

  /** Deformable displacement in mm at a place in voxels of the images, linear between its own voxels. */
  function displacement(at) {
    if (!steps) return [0, 0, 0];
    const low = [], share = [];
    for (let axis = 0; axis < 3; axis++) {
      const place = Math.min(Math.max((at[axis] + 0.5) * ratio[axis] - 0.5, 0), fieldShape[axis] - 1);
      low.push(Math.min(Math.floor(place), fieldShape[axis] - 2));
      share.push(place - low[axis]);
    }
    const sum = [0, 0, 0];
    for (let corner = 0; corner < 8; corner++) {
      let weight = 1, n = 0;
      for (let axis = 0; axis < 3; axis++) {
        const bit = (corner >> axis) & 1;
        weight *= bit ? share[axis] : 1 - share[axis];
        n += fieldStrides[axis] * (low[axis] + bit);
      }
      for (let axis = 0; axis < 3; axis++) sum[axis] += weight * steps[n + axis * fieldSize] * data.stepMm;
    }
    return sum;
  }

  function movingPlace(at) {
    const mm = world(at), d = displacement(at), x = mm.map((value, axis) => value + d[axis]);
    return data.linear.slice(0, 3).map(row => row[0] * x[0] + row[1] * x[1] + row[2] * x[2] + row[3]);
  }

  // -- drawing ----------------------------------------------------------------------------------------------

  for (const plane of PLANES) {
    plane.canvas = $(plane.name);
    plane.width = shape[plane.across];
    plane.height = shape[plane.up];
    plane.pixels = new OffscreenCanvas(plane.width, plane.height);
    plane.canvas.style.aspectRatio = `${plane.width} / ${plane.height}`;
  }

  /** Grey values or colours of a plane, with the overlay. */
  function paint(plane) {
    const { across, up, through, width, height } = plane;
    const moving = movings[state.moving][state.when];
    const overlay = OVERLAYS[state.overlay];
    const image = new ImageData(width, height), out = image.data;
    const field = Math.max(1, Math.round(Math.max(width, height) / FIELDS));
    const at = [...state.at];
    for (let row = 0, pixel = 0; row < height; row++) {
      at[up] = height - 1 - row;
      for (let column = 0; column < width; column++, pixel += 4) {
        at[across] = width - 1 - column;
        const n = index(at), f = fixed[n], m = moving[n];
        let r, g, b;
        if (m === 0) r = g = b = DIM * f;
        else if (state.mode === "colours") [r, g, b] = [m, f, m];
        else if (state.mode === "checkerboard") r = g = b = (Math.floor(row / field) + Math.floor(column / field)) % 2 ? m : f;
        else r = g = b = (1 - state.blend) * f + state.blend * m;
        if (overlay && f) {
          const code = overlay.codes[fieldIndex(at)];
          if (code) {
            const colour = overlay.codes === jacobian && code === data.folded ? data.foldColour : overlay.colours[code];
            r += state.strength * (colour[0] - r);
            g += state.strength * (colour[1] - g);
            b += state.strength * (colour[2] - b);
          }
        }
        out[pixel] = r;
        out[pixel + 1] = g;
        out[pixel + 2] = b;
        out[pixel + 3] = 255;
      }
    }
    plane.pixels.getContext("2d").putImageData(image, 0, 0);
  }

  const canvasX = (plane, n) => ((plane.width - 0.5 - n) / plane.width) * plane.canvas.width;
  const canvasY = (plane, n) => ((plane.height - 0.5 - n) / plane.height) * plane.canvas.height;

  function draw(plane) {
    const canvas = plane.canvas, density = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * density));
    canvas.height = Math.max(1, Math.round((canvas.width * plane.height) / plane.width));
    paint(plane);
    const context = canvas.getContext("2d");
    context.drawImage(plane.pixels, 0, 0, canvas.width, canvas.height);
    if (state.lines) drawLines(plane, context, density);
    if (state.contours && labels) {
      drawContour(plane, context, labels[0], data.fixedLine, [], density);
      drawContour(plane, context, labels[state.when === "after" ? 2 : 1], data.movingLine, [5, 3], density);
    }
    if (state.marks && data.points) drawMarks(plane, context, density);
    drawCross(plane, context, density);
    const mm = world(state.at)[plane.through];
    canvas.setAttribute("aria-label", `${plane.name} plane at ${AXES[plane.through]} ${mm.toFixed(1)} mm`);
  }

  function drawCross(plane, context, density) {
    const x = canvasX(plane, state.at[plane.across]), y = canvasY(plane, state.at[plane.up]), gap = 8 * density;
    const { width, height } = plane.canvas;
    context.setLineDash([]);
    for (const [colour, thickness] of [["#000", 3], ["#fff", 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = thickness * density;
      context.beginPath();
      for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, width, y], [x, 0, x, y - gap], [x, y + gap, x, height]]) {
        context.moveTo(x0, y0);
        context.lineTo(x1, y1);
      }
      context.stroke();
    }
    context.font = `bold ${13 * density}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 3 * density;
    const edge = 10 * density;
    for (const [letter, lx, ly] of [
      [AXES[plane.across], edge, height / 2], [OPPOSITE[plane.across], width - edge, height / 2],
      [AXES[plane.up], width / 2, edge], [OPPOSITE[plane.up], width / 2, height - edge],
    ]) {
      context.strokeStyle = "#000";
      context.strokeText(letter, lx, ly);
      context.fillStyle = "#fff";
      context.fillText(letter, lx, ly);
    }
  }

  /** What the deformation does to straight lines of the plane. */
  function drawLines(plane, context, density) {
    const { across, up } = plane, step = data.lineMm / data.spacing;
    context.strokeStyle = "#ffb000";
    context.lineWidth = density;
    context.setLineDash([]);
    context.beginPath();
    for (const [along, over] of [[across, up], [up, across]]) {
      for (let place = step / 2; place < shape[over]; place += step) {
        const at = [...state.at];
        at[over] = place;
        for (let n = 0; n < shape[along]; n++) {
          at[along] = n;
          const d = displacement(at);
          const x = canvasX(plane, at[across] + d[across] / data.spacing);
          const y = canvasY(plane, at[up] + d[up] / data.spacing);
          n ? context.lineTo(x, y) : context.moveTo(x, y);
        }
      }
    }
    context.stroke();
  }

  /** Lines between pixels of different labels. */
  function drawContour(plane, context, map, colour, dashes, density) {
    const { across, up, width, height } = plane, at = [...state.at];
    const label = (i, j) => {
      at[across] = i;
      at[up] = j;
      return map[index(at)];
    };
    context.beginPath();
    for (let j = 0; j < height; j++) {
      for (let i = 0; i < width; i++) {
        const here = label(i, j);
        if (i + 1 < width && label(i + 1, j) !== here) {
          context.moveTo(canvasX(plane, i + 0.5), canvasY(plane, j - 0.5));
          context.lineTo(canvasX(plane, i + 0.5), canvasY(plane, j + 0.5));
        }
        if (j + 1 < height && label(i, j + 1) !== here) {
          context.moveTo(canvasX(plane, i - 0.5), canvasY(plane, j + 0.5));
          context.lineTo(canvasX(plane, i + 0.5), canvasY(plane, j + 0.5));
        }
      }
    }
    context.strokeStyle = colour;
    context.lineWidth = 1.5 * density;
    context.setLineDash(dashes.map(length => length * density));
    context.stroke();
  }

  /** Landmarks within two voxels of the plane: fixed ones as circles, moving ones as crosses, joined by a line. */
  function drawMarks(plane, context, density) {
    const size = 4 * density, near = Math.max(2, 3 / data.spacing);
    const others = data.points[state.when === "after" ? 2 : 1];
    context.lineWidth = 1.5 * density;
    context.setLineDash([]);
    data.points[0].forEach((mm, n) => {
      const a = voxel(mm), b = voxel(others[n]);
      if (Math.abs(a[plane.through] - state.at[plane.through]) > near) return;
      const [x, y, u, v] = [canvasX(plane, a[plane.across]), canvasY(plane, a[plane.up]), canvasX(plane, b[plane.across]), canvasY(plane, b[plane.up])];
      context.strokeStyle = data.fixedLine;
      context.beginPath();
      context.arc(x, y, size, 0, 2 * Math.PI);
      context.stroke();
      context.strokeStyle = data.movingLine;
      context.beginPath();
      context.moveTo(u - size, v - size);
      context.lineTo(u + size, v + size);
      context.moveTo(u - size, v + size);
      context.lineTo(u + size, v - size);
      context.moveTo(x, y);
      context.lineTo(u, v);
      context.stroke();
    });
  }

  function tell() {
    const place = mm => AXES.map((axis, n) => `${axis} ${mm[n].toFixed(1)}`).join("  ");
    const n = index(state.at), cell = fieldIndex(state.at), code = jacobian[cell], m = movings[state.moving][state.when][n];
    const rows = [["fixed, mm", place(world(state.at))], ["moving, mm", place(movingPlace(state.at))]];
    if (steps) {
      const d = displacement(state.at);
      rows.push(["displacement, mm", `${place(d)}  (${Math.hypot(...d).toFixed(1)})`]);
      rows.push(["Jacobian", code === 0 ? "outside" : code === data.folded ? "folded" : (2 ** ((code - 128) / data.doubled)).toFixed(2)]);
    }
    if (confidence) rows.push(["expected error, mm", confidence[cell] ? (((confidence[cell] - 1) / 254) * data.confidenceMaxMm).toFixed(2) : "unknown"]);
    rows.push(["brightness, fixed and moving", `${level(fixed[n])}  ${level(m)}`]);
    if (labels) {
      const name = map => (map[n] ? data.labelIds[map[n] - 1] : "none");
      rows.push(["label, fixed and moving", `${name(labels[0])}  ${name(labels[state.when === "after" ? 2 : 1])}`]);
    }
    $("readout").replaceChildren(...rows.map(([name, value]) => {
      const row = document.createElement("div"), term = document.createElement("dt"), what = document.createElement("dd");
      term.textContent = name;
      what.textContent = value;
      row.append(term, what);
      return row;
    }));
  }
  const level = code => (code ? `${Math.round(((code - 1) / 254) * 100)} %` : "nothing");

  let waiting = false;
  function refresh() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      PLANES.forEach(draw);
      tell();
    });
  }

  // -- controls ---------------------------------------------------------------------------------------------

  function moveTo(axis, n) {
    state.at[axis] = Math.min(Math.max(Math.round(n), 0), shape[axis] - 1);
    refresh();
  }

  function show(when) {
    state.when = when;
    document.querySelector(`input[name=when][value=${when}]`).checked = true;
    refresh();
  }
  const swap = () => show(state.when === "after" ? "before" : "after");

  function flicker() {
    clearInterval(timer);
    timer = timer === null ? setInterval(swap, FLICKER_MS) : null;
    $("flicker").setAttribute("aria-pressed", String(timer !== null));
    if (timer === null) show("after");
  }

  function chooseMode(mode) {
    state.mode = $("mode").value = mode;
    $("blend").disabled = mode !== "blend";
    refresh();
  }

  function chooseOverlay(name) {
    state.overlay = name;
    const overlay = OVERLAYS[name];
    $("legend").hidden = !overlay;
    if (overlay) {
      $("low").textContent = overlay.low;
      $("high").textContent = overlay.high;
      const bar = new ImageData(256, 1);
      overlay.colours.forEach((colour, n) => bar.data.set([...colour, 255], 4 * n));
      $("scale").getContext("2d").putImageData(bar, 0, 0);
    }
    refresh();
  }

  function toggle(name) {
    if ($(name).closest("label").hidden) return;
    state[name] = $(name).checked = !state[name];
    refresh();
  }

  for (const plane of PLANES) {
    const { canvas, across, up, through } = plane;
    const follow = event => {
      const box = canvas.getBoundingClientRect();
      moveTo(across, plane.width - 0.5 - ((event.clientX - box.left) / box.width) * plane.width);
      moveTo(up, plane.height - 0.5 - ((event.clientY - box.top) / box.height) * plane.height);
    };
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      follow(event);
    });
    canvas.addEventListener("pointermove", event => event.buttons && follow(event));
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      moveTo(through, state.at[through] - Math.sign(event.deltaY));
    }, { passive: false });
    canvas.addEventListener("keydown", event => {
      const moves = {
        ArrowLeft: [across, 1], ArrowRight: [across, -1], ArrowUp: [up, 1], ArrowDown: [up, -1],
        PageUp: [through, 1], PageDown: [through, -1],
      };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const [axis, step] = moves[event.key];
      moveTo(axis, state.at[axis] + step * (event.shiftKey ? 10 : 1));
    });
  }

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const actions = {
      b: swap, f: flicker, c: () => chooseMode(state.mode === "checkerboard" ? "blend" : "checkerboard"),
      g: () => toggle("lines"), l: () => toggle("contours"),
    };
    actions[event.key.toLowerCase()]?.();
  });

  document.querySelectorAll("input[name=when]").forEach(input => input.addEventListener("change", () => show(input.value)));
  $("flicker").addEventListener("click", flicker);
  $("mode").addEventListener("change", event => chooseMode(event.target.value));
  $("blend").addEventListener("input", event => { state.blend = event.target.value / 100; refresh(); });
  $("strength").addEventListener("input", event => { state.strength = event.target.value / 100; refresh(); });
  $("overlay").addEventListener("change", event => chooseOverlay(event.target.value));
  $("moving")?.addEventListener("change", event => { state.moving = Number(event.target.value); refresh(); });
  for (const [name, there] of [["lines", steps], ["contours", labels], ["marks", data.points]]) {
    if (!there) continue;
    $(name).closest("label").hidden = false;
    $(name).addEventListener("change", event => { state[name] = event.target.checked; refresh(); });
  }
  for (const [key, overlay] of Object.entries(OVERLAYS)) $("overlay").add(new Option(overlay.name, key));

  $("viewer").hidden = false;
  $("stills").open = false;
  new ResizeObserver(refresh).observe(document.querySelector(".planes"));
  refresh();
})();
