"""Lua scripts: steps on Redis that must happen whole or not at all.

All keys are on one Redis (no cluster). A script that is sent again because its reply was lost finds
its own traces and changes nothing. Redis does not take back what a script did before it failed, so
what can fail (a key of another type) is checked before the first write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Return names and values in turns, as arguments of a script."""
    return [part for pair in fields.items() for part in pair]


_NEEDS = """
local function full(key)
  local info = redis.call('XINFO', 'STREAM', key)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
      return info[i + 1] == '18446744073709551615-18446744073709551615'
    end
  end
end
local function found_wrong(key, needed)
  local found = redis.call('TYPE', key).ok
  if found == 'none' then return nil end
  if found ~= needed then return found end
  -- Somebody gave an entry the last of all ids, so no entry can follow.
  if found == 'stream' and full(key) then return 'stream without free ids' end
end
local function wrong(key, needed)
  local found = found_wrong(key, needed)
  if not found then return nil end
  return redis.error_reply('WRONGTYPE ' .. key .. ' holds a ' .. found .. '; needed a ' .. needed)
end
"""

ANSWER = (
    _NEEDS
    + """
-- KEYS: owner of the session, state of the session
-- ARGV: me, lease (ms), stream and id of the entry answered, seconds that the state is kept,
--       entries an output stream keeps, number of state fields, these; number of messages, each as
--       stream, number of fields, these; entries to delete, as stream and id
local problem = wrong(KEYS[1], 'string') or wrong(KEYS[2], 'hash')
local look = 9 + 2 * tonumber(ARGV[7])
for i = 1, tonumber(ARGV[look - 1]) do
  problem = problem or wrong(ARGV[look], 'stream')
  look = look + 2 + 2 * tonumber(ARGV[look + 1])
end
if problem then return problem end
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
if not owner then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
if ARGV[4] ~= '' and redis.call('HGET', KEYS[2], ARGV[3]) == ARGV[4] then return 1 end
local at = 7
local count = tonumber(ARGV[at]); at = at + 1
for i = 1, count do
  redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1]); at = at + 2
end
if ARGV[4] ~= '' then redis.call('HSET', KEYS[2], ARGV[3], ARGV[4]) end
redis.call('EXPIRE', KEYS[2], ARGV[5])
count = tonumber(ARGV[at]); at = at + 1
for i = 1, count do
  local fields = {}
  for j = 1, 2 * tonumber(ARGV[at + 1]) do fields[j] = ARGV[at + 1 + j] end
  redis.call('XADD', ARGV[at], 'MAXLEN', '~', ARGV[6], '*', unpack(fields))
  at = at + 2 + #fields
end
while at < #ARGV do
  redis.call('XDEL', ARGV[at], ARGV[at + 1]); at = at + 2
end
return 1
"""
)
"""Sends the answers to one entry, saves the state, and deletes entries that nobody needs, but only
while the session is ours. 1: done now or before. 0: the session is another server's."""

OPEN = (
    _NEEDS
    + """
-- KEYS: mark of this request, open sessions, owner of the session, state, answers, then its streams
-- ARGV: me, lease (ms), session, description (JSON), number of answer fields, these, the same for a
--       refusal
local problem = wrong(KEYS[1], 'string') or wrong(KEYS[2], 'hash') or wrong(KEYS[5], 'stream')
if problem then return problem end
local taken = redis.call('GET', KEYS[1])
if taken then
  if taken == ARGV[1] and redis.call('HEXISTS', KEYS[2], ARGV[3]) == 1 then return 1 end
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', 60)
local at, result = 5, 1
if redis.call('HEXISTS', KEYS[2], ARGV[3]) == 1 then
  at = at + 1 + 2 * tonumber(ARGV[at])
  result = 0
else
  for i = 4, #KEYS do if i ~= 5 then redis.call('DEL', KEYS[i]) end end
  redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
  redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[2])
end
local fields = {}
for j = 1, 2 * tonumber(ARGV[at]) do fields[j] = ARGV[at + j] end
redis.call('XADD', KEYS[5], 'MAXLEN', '~', 10000, '*', unpack(fields))
return result
"""
)
"""Opens a session and answers the request, once among all servers that read it. 1: it is ours.
0: it is refused, or another server took the request."""

ONCE = (
    _NEEDS
    + """
-- KEYS: mark of this request, stream of the answer;  ARGV: me, fields
local problem = wrong(KEYS[2], 'stream')
if problem then return problem end
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', 60) then
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', 10000, '*', unpack(ARGV, 2))
  return 1
end
return 0
"""
)
"""Answers a request that every server reads, once."""

RENEW = """
-- KEYS: owner, state;  ARGV: me, lease (ms), seconds that the state is kept
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""
"""Renews the lease of a session. 0: it is another server's."""

RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
"""Deletes a key if it is ours."""

KEEP_JOB = """
-- KEYS: jobs;  ARGV: group, me, id
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
return 1
"""
"""Renews the claim on a job for another lease. 0: another worker has claimed it."""

FORGET_WORKER = """
-- KEYS: jobs;  ARGV: group, worker
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
"""
"""Removes a worker from the group, unless it holds a job. One that lives joins again by reading."""

FINISH_JOB = (
    _NEEDS
    + """
-- KEYS: jobs, batch, results, dead letters
-- ARGV: group, entry id, job, seconds that results are kept, dead letters that are kept, number of
--       fields of a dead letter, these, the result's fields
local problem = wrong(KEYS[3], 'stream') or wrong(KEYS[4], 'stream')
if problem then return problem end
local after = 7 + 2 * tonumber(ARGV[6])
-- The batch's hash has the jobs that want a result. One that is set aside does not wait for it.
problem = wrong(KEYS[2], 'hash')
if problem and after == 7 then return problem end
local wanted = not problem and redis.call('HGET', KEYS[2], ARGV[3]) == 'queued'
if wanted then
  -- First what can fail: an error ends the script, and the job must be pending then.
  redis.call('XADD', KEYS[3], '*', unpack(ARGV, after))
  redis.call('EXPIRE', KEYS[3], ARGV[4])
  redis.call('HSET', KEYS[2], ARGV[3], 'done')
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
if after > 7 and #redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2]) > 0 then
  redis.call('XADD', KEYS[4], 'MAXLEN', ARGV[5], '*', unpack(ARGV, 7, after - 1))
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
return wanted and 1 or 0
"""
)
"""Writes a job's result, and a dead letter if it has one, and deletes the job.

0: it had a result, or the client left and deleted its batch.
"""

SET_ASIDE = (
    _NEEDS
    + """
-- KEYS: a key, where it goes;  ARGV: the type that it should have
local found = found_wrong(KEYS[1], ARGV[1])
if not found then return {} end
local place, number = KEYS[2], 1
while redis.call('EXISTS', place) == 1 do
  number = number + 1
  place = KEYS[2] .. ':' .. number
end
redis.call('RENAME', KEYS[1], place)
return {found, place}
"""
)
"""Renames a key of another type, or a stream that can take no entry. Returns what it held and its
new name, or nothing if it is right."""
