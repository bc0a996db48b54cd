// Figures that can be moved. All is computed here, from the answers in play-data.js.
const RUN = window.RUN
const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`
const plain = text => text.replace(/[&<>"]/g, sign => `&#${sign.charCodeAt(0)};`)  // classes are called as their folders
const sum = list => list.reduce((a, b) => a + b, 0)

// A plane with axes from 0 to 1 on either side, as wide as there is room.
function plane(box, x, y, describe) {
  const w = Math.max(260, box.clientWidth - 34), h = Math.min(300, w * .62), left = 52, low = h - 46
  const px = v => left + (v - x.from) / (x.to - x.from) * (w - left - 12)
  const py = v => low - (v - y.from) / (y.to - y.from) * (low - 12)
  let inside = ''
  const draw = {
    line: (points, colour, width = 2) => inside += `<polyline fill="none" stroke="${colour}" stroke-width="${width}"
      points="${points.map(([a, b]) => `${px(a)},${py(b)}`).join(' ')}"/>`,
    bar: (from, to, top, colour) => inside += `<rect x="${px(from) + 1}" y="${py(top)}" width="${px(to) - px(from) - 2}"
      height="${py(y.from) - py(top)}" fill="${colour}"/>`,
    dot: (a, b, colour, r = 6) => inside += `<circle cx="${px(a)}" cy="${py(b)}" r="${r}" fill="${colour}"/>`,
    label: (a, b, words) => inside += `<text class="on" x="${px(a)}" y="${py(b)}" text-anchor="middle">${words}</text>`,
  }
  const ticks = axis => axis.ticks.map(t => [t, axis.label ? axis.label(t) : percent(t, 0)])
  for (const [t, words] of ticks(x)) inside += `<text x="${px(t)}" y="${low + 18}" text-anchor="middle">${words}</text>`
  for (const [t, words] of ticks(y)) {
    inside += `<text x="${left - 6}" y="${py(t) + 4}" text-anchor="end">${words}</text>
      <line x1="${left}" x2="${w - 12}" y1="${py(t)}" y2="${py(t)}" stroke="currentColor" stroke-opacity=".15"/>`
  }
  inside += `<text x="${(left + w) / 2}" y="${h - 6}" text-anchor="middle">${x.title}</text>`
  draw.show = () => box.querySelector('.plane').innerHTML =
    `<p style="margin:0;font-size:13px">${y.title}</p><svg viewBox="0 0 ${w} ${h}" role="img" aria-label="${describe}">${inside}</svg>`
  return draw
}

// A box with controls, a sentence that is read out when it changes, and a drawing; drawn anew whenever something moves.
function figure(id, controls, redraw) {
  const box = document.getElementById(id)
  box.innerHTML = `${controls}<output for="${id}-at" aria-live="polite"></output><div class="plane"></div>`
  document.querySelector(`.still-${id}`)?.remove()
  const again = () => box.querySelector('output').textContent = redraw(box)
  box.addEventListener('input', again)
  box.addEventListener('reset', again)
  addEventListener('resize', again)
  again()
  return again
}

const slider = (id, words, low, high, step, value) =>
  `<label for="${id}-at">${words}</label><input id="${id}-at" type="range" min="${low}" max="${high}" step="${step}" value="${value}">`

// Answers at a temperature: how sure each is, and whether it is right; `below` holds logits under the likeliest class.
function answers(temperature) {
  return RUN.below.map((row, i) => {
    const weights = row.map(b => Math.exp(-b / 100 / temperature)), likeliest = row.indexOf(0)
    return { sure: 1 / sum(weights), right: likeliest === RUN.labels[i], truth: weights[RUN.labels[i]] / sum(weights) }
  })
}

const BLUE = '#1f77b4', ORANGE = '#d55e00'

if (RUN.below) {
  const calibrated = answers(RUN.temperature).sort((a, b) => b.sure - a.sure), n = calibrated.length
  let wrong = 0
  const curve = calibrated.map((a, i) => [(i + 1) / n, (wrong += !a.right) / (i + 1)])
  const top = Math.max(.05, Math.ceil(20 * Math.max(...curve.slice(Math.floor(n / 20)).map(p => p[1]))) / 20)
  figure('threshold', slider('threshold', 'It answers where it is at least this sure:', 0, .999, .001, .9), box => {
    const at = +box.querySelector('input').value, given = calibrated.filter(a => a.sure >= at)
    const errors = given.filter(a => !a.right).length, share = given.length ? errors / given.length : 0
    const draw = plane(box, { from: 0, to: 1, ticks: [0, .25, .5, .75, 1], title: 'images answered, the surest first' },
      { from: 0, to: top, ticks: [0, top / 2, top], label: t => percent(t), title: 'errors among the answers' },
      'Errors among the answers against the share of images answered')
    draw.line(curve.map(([a, b]) => [a, Math.min(b, top)]), BLUE)
    draw.dot(given.length / n, Math.min(share, top), ORANGE)
    draw.show()
    return `At ${percent(at)}: ${given.length} of ${n} images answered, ${errors} of them wrongly (${percent(share)}). `
      + `${n - given.length} are left to a person, ${wrong - errors} of which the model would have got wrong.`
  })

  const words = 'Logits are divided by this temperature (the middle changes nothing):'
  const again = figure('temperature', slider('temperature', words, -2, 2, .02, 0)
    + `<button type="button">the book's own: ${RUN.temperature.toFixed(2)}</button>`, box => {
    const temperature = 2 ** +box.querySelector('input').value, all = answers(temperature)
    const draw = plane(box, { from: 0, to: 1, ticks: [0, .25, .5, .75, 1], title: 'how sure it says it is' },
      { from: 0, to: 1, ticks: [0, .5, 1], title: 'how often it is right (bars), and should be (line)' },
      'Share of right answers by confidence, in ten bins, beside the diagonal')
    let off = 0
    for (let bin = 0; bin < 10; bin++) {
      const inside = all.filter(a => Math.min(9, Math.floor(10 * a.sure)) === bin), k = inside.length
      if (!k) continue
      const right = inside.filter(a => a.right).length / k
      off += Math.abs(sum(inside.map(a => a.sure)) - right * k) / all.length
      draw.bar(bin / 10, (bin + 1) / 10, right, BLUE)
      draw.label((bin + .5) / 10, Math.max(right - .09, .02), k)
    }
    draw.line([[0, 0], [1, 1]], ORANGE)
    draw.show()
    const loss = -sum(all.map(a => Math.log(Math.max(a.truth, 1e-12)))) / all.length
    return `Temperature ${temperature.toFixed(2)}: expected calibration error ${percent(off)}, loss ${loss.toFixed(3)} nats. `
      + `Right are ${percent(sum(all.map(a => a.right)) / all.length)}, whatever the temperature. Bars carry their number of images.`
  })
  document.querySelector('#temperature button').addEventListener('click', () => {
    document.querySelector('#temperature input').value = Math.log2(RUN.temperature)
    again()
  })
}

const names = Object.keys(RUN.corruptions)
if (names.length) {
  const options = names.map(name => `<option>${name}</option>`).join('')
  const levels = RUN.corruptions[names[0]].length
  const curve = name => [[0, RUN.clean], ...RUN.corruptions[name].map((row, i) => [i + 1, row[0]])]
  const low = Math.floor(10 * Math.min(...names.flatMap(name => curve(name).map(p => p[1])))) / 10
  figure('corruption', `<label>Pictures suffer from <select>${options}</select></label>`
    + slider('corruption', 'of severity', 0, levels, 1, 3), box => {
    const name = box.querySelector('select').value, at = +box.querySelector('input').value
    const draw = plane(box, { from: 0, to: levels, ticks: [...Array(levels + 1).keys()], label: String, title: 'severity' },
      { from: low, to: 1, ticks: [low, (1 + low) / 2, 1], title: 'accuracy; grey: the other corruptions' },
      `Accuracy of the fine-tuned model by severity, under ${name} and under the other corruptions`)
    for (const other of names) draw.line(curve(other), '#8888', 1)
    draw.line(curve(name), BLUE, 3)
    draw.dot(at, curve(name)[at][1], ORANGE)
    draw.show()
    if (!at) return `Clean pictures: ${percent(RUN.clean)} are right.`
    const [value, from, to] = RUN.corruptions[name][at - 1]
    return `${name}, severity ${at}: ${percent(value)} right (95 % interval ${percent(from)} to ${percent(to)}), `
      + `${percent(RUN.clean)} when clean.`
  })
}

if (RUN.looks?.length) {
  const heads = RUN.looks[0].maps.length
  const options = RUN.looks.map((look, i) => `<option value="${i}">${plain(look.name)}</option>`).join('')
  figure('head', `<label>A test picture of <select>${options}</select></label>`
    + slider('head', 'head of the last block (0: the mean of all)', 0, heads, 1, 1), box => {
    const look = RUN.looks[+box.querySelector('select').value], at = +box.querySelector('input').value
    const chosen = at ? [look.maps[at - 1]] : look.maps
    const map = chosen[0].map((row, r) => row.map((_, c) => sum(chosen.map(m => m[r][c])) / chosen.length / 1e4))
    const flat = map.flat(), top = Math.max(...flat), rows = map.length, columns = map[0].length
    const quarter = sum(flat.sort((a, b) => b - a).slice(0, Math.ceil(flat.length / 4)))
    const patches = map.flatMap((row, r) => row.map((v, c) =>
      `<rect x="${c}" y="${r}" width="1" height="1" fill="#000" fill-opacity="${(.75 * (1 - Math.sqrt(v / top))).toFixed(2)}"/>`))
    box.querySelector('.plane').innerHTML = `<svg viewBox="0 0 ${columns} ${rows}" style="max-width:22rem" role="img"
      aria-label="${plain(look.name)}, darkened where the head does not look"><image href="${look.picture}" width="${columns}"
      height="${rows}" style="image-rendering:pixelated"/>${patches.join('')}</svg>`
    return `${at ? `Head ${at} of ${heads}` : `The mean of ${heads} heads`}, ${look.name}: a quarter of the patches get `
      + `${percent(quarter)} of the attention.`
  })
}
