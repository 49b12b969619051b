// Makes a UI workflow of an API prompt with the real frontend: node save.mjs PORT PROMPT.json WORKFLOW.json
import fs from 'node:fs'
import path from 'node:path'
import { pathToFileURL } from 'node:url'

const { chromium } = await import(pathToFileURL(path.join(process.env.PLAYWRIGHT, 'index.mjs')))
const [port, source, target] = process.argv.slice(2)
const server = `http://127.0.0.1:${port}`
await fetch(`${server}/api/settings/Comfy.TutorialCompleted`, {
  method: 'POST', headers: { 'Content-Type': 'application/json' }, body: 'true'
})
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
})
const page = await browser.newPage()
await page.goto(server, { waitUntil: 'domcontentloaded' })
await page.waitForFunction(
  () => window.app?.isGraphReady && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100,
  null, { timeout: 180000 }
)
await page.waitForTimeout(1500)
const workflow = await page.evaluate(async (api) => {
  await app.loadApiJson(api, 'made')
  for (const node of app.graph.nodes)
    for (const widget of node.widgets ?? [])
      if (widget.name === 'control_after_generate') widget.value = 'fixed' // a shipped seed stays what it is
  app.graph.arrange?.()
  return app.graph.serialize()
}, JSON.parse(fs.readFileSync(source, 'utf8')))
fs.writeFileSync(target, JSON.stringify(workflow, null, 1) + '\n')
await browser.close()
