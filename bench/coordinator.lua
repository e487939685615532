-- Requests of `wrk`: a streamed chat or completion each, prompts that differ, 16 tokens or as many as are asked for.
-- Arguments: path, model, tokens, words of a prompt.

local path, model, num_tokens, num_words = "/v1/chat/completions", "model", 16, 64
local prepared, number = {}, 0
local words = { "sky", "blue", "child", "tell", "water", "light", "river", "stone", "green", "cloud", "north", "bird" }

local function body(index)
  local text = { "request " .. index }
  for word = 1, num_words do
    text[#text + 1] = words[(index * 31 + word * word) % #words + 1]
  end
  local content = table.concat(text, " ")
  local prompt = '"prompt":"' .. content .. '"'
  if path:find("chat") then
    prompt = '"messages":[{"role":"user","content":"' .. content .. '"}]'
  end
  return string.format(
    '{"model":"%s",%s,"stream":true,"max_tokens":%d,"temperature":0,"ignore_eos":true}', model, prompt, num_tokens
  )
end

function init(arguments)
  path, model = arguments[1] or path, arguments[2] or model
  num_tokens, num_words = tonumber(arguments[3]) or num_tokens, tonumber(arguments[4]) or num_words
  wrk.headers["Content-Type"] = "application/json"
  for index = 1, 1000 do
    prepared[index] = wrk.format("POST", path, nil, body(index))
  end
end

function request()
  number = number % #prepared + 1
  return prepared[number]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%d,"duration_s":%.6f,"bytes":%d,"latency_p50_s":%.6f,"latency_p99_s":%.6f,'
      .. '"errors":{"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}}\n',
    summary.requests, summary.duration / 1e6, summary.bytes, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
    errors.connect, errors.read, errors.write, errors.status, errors.timeout
  ))
end
