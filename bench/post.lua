-- wrk script: POST the bodies of a file, one a line, in turn. A run of nine # becomes a number of its own.
-- Arguments: the file, the path, the key, a seed, and the mean pause of a connection in ms (0: none).
local mark = "#########"
local threads = 0
local requests, position, number, pause_ms = {}, 0, 0, 0

function setup(thread)
  thread:set("thread_number", threads)
  threads = threads + 1
end

-- The request, cut where the number goes: table.concat puts it in.
local function cut(text)
  local pieces, from = {}, 1
  while true do
    local first, last = text:find(mark, from, true)
    pieces[#pieces + 1] = text:sub(from, (first or 0) - 1)
    if not first then return pieces end
    from = last + 1
  end
end

function init(args)
  local headers = { ["Content-Type"] = "application/json", ["X-API-Key"] = args[3] }
  for body in io.lines(args[1]) do
    requests[#requests + 1] = cut(wrk.format("POST", args[2], headers, body))
  end
  math.randomseed(tonumber(args[4]) + thread_number)
  position = math.random(#requests)
  number = math.random(100000000, 500000000)
  pause_ms = tonumber(args[5])
  if pause_ms == 0 then delay = nil end
end

function request()
  position = position % #requests + 1
  number = number + 1
  return table.concat(requests[position], tostring(number))
end

-- Exponential pauses make arrivals that know nothing of one another.
function delay()
  return math.floor(-math.log(1 - math.random()) * pause_ms + 0.5)
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.6f, "errors": %d, "p50_ms": %.3f, "p99_ms": %.3f}\n',
    summary.requests, summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
