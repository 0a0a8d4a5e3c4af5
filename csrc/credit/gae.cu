// Advantages and returns, and their gradient: an affine scan along each sequence, in groups.
//
//   tokens    t t t t   t t t t  ...  t t t t      four to a lane, 128 to a warp: a tile
//                |         |             |
//                | fold    | fold        | fold    each token is a map x -> b + a x: see Affine
//                v         v             v
//   lanes       f_0       f_1    ...    f_31
//                \__ compose_lanes, in a tree __/  gives each lane the maps of those before it
//                             |
//   warps          F_0       F_1   ...   F_7       a group of eight tiles, in shared memory
//                   \___ compose_lanes ___/        by the first warp of the block
//                             |
//   groups  x ------------->  G  ------> x         to the block's next group
//                   |         |
//                   | unfold  | unfold             from x before the lane, its four maps again
//                   v         v
//   results   A A A A   A A A A  ...  A A A A
//
// The map of a token needs a number of the unmasked token before it in the scan: its message. In
// the forward scan, which goes from the last token to the first, that is a value; in the backward
// scan it is what a unit of gradient sends on. Messages pass through the lanes of a warp, from warp
// to warp and from group to group as the maps do.
//
// A long sequence is shared by several blocks. Then a first launch stores the map G of every group,
// and in the second each block passes x through those of the groups before its own. Tiles and
// groups are counted from the sequence's first token, and x passes through every group in turn: the
// bits of a sequence depend on its own tokens alone, not on the batch, nor on who scans what.
#include "common/bind.h"
#include "common/dtype.h"
#include "credit/gae_tokens.h"

namespace fpg {
namespace {

// How a launch divides the batch among its blocks.
struct Division {
  int neighbours;  // So many sequences go to a block, which scans them side by side if they fit.
  int parts;       // The groups of a sequence go to so many blocks.
  bool maps_only;  // This launch stores the maps of the groups, but those of the last part.
  void* maps;

  FPG_METHOD int blocks_per_sequence() const { return maps_only ? parts - 1 : parts; }

  // The maps of the groups of a sequence.
  template <typename Map>
  __device__ Map* maps_of(const Sequence& sequence) const {
    return static_cast<Map*>(maps) + sequence.begin / kGroupTokens + sequence.index;
  }
};

// What goes from group to group: the message and the x of the last unmasked token.
template <typename Scan>
struct Carry {
  typename Scan::Message message;
  double x;
};

// What the warps of a block tell each other, and what would else take registers from the tokens.
template <typename Scan>
struct Shared {
  Team teams[kWarps];         // that each warp belongs to
  Carry<Scan> carry[kWarps];  // of the team that begins with this warp
  int64_t next;               // the sequence that the next teams begin with
  bool any;                   // Some sequence was left for the teams.
  LastMessage<typename Scan::Message> last[kWarps];
  typename Scan::Map maps[kWarps];
  double x[kWarps];  // before the tile of each warp
};

// The four tokens of a lane, in the order of the scan. kFull: none is masked or missing.
template <bool kFull, typename Scan>
struct Lane {
  using Message = typename Scan::Message;
  using Map = typename Scan::Map;
  const Scan& scan;
  const typename Scan::Tokens& tokens;
  int64_t sequence;
  Map maps[4];

  template <typename Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = Scan::kReverse ? 3 - i : i;
      if (kFull || scan.kept(tokens, token)) body(token);
    }
  }

  __device__ LastMessage<Message> last_message() const {
    LastMessage<Message> out = {{}, false};
    each([&](int i) { out = {scan.message(tokens, i, sequence), true}; });
    return out;
  }

  // The maps of the four tokens as one. `message` comes from the token before them.
  __device__ Map fold(Message message) {
    Map out = {1.0, 0.0};
    each([&](int i) {
      maps[i] = scan.map(tokens, i, sequence, message);
      out = maps[i].after(out);
      message = scan.message(tokens, i, sequence);
    });
    return out;
  }

  // The results of the four tokens, from the x before them.
  __device__ typename Scan::Out unfold(Message message, double x) const {
    typename Scan::Out out = {};
    each([&](int i) {
      const double before = x;
      x = maps[i](x);
      scan.write(out, tokens, i, sequence, message, before, x);
      message = scan.message(tokens, i, sequence);
    });
    return out;
  }
};

// Shows the warp's last message to the block; returns it, and what the lanes before this one have.
template <bool kFull, typename Scan>
__device__ inline LastMessage<typename Scan::Message> show_message(const Lane<kFull, Scan>& lane,
                                                                   Shared<Scan>& all) {
  LastMessage<typename Scan::Message> before;
  const auto last = last_message_of_warp<kFull>(lane.last_message(), before);
  if (threadIdx.x % kWarp == kWarp - 1) all.last[threadIdx.x / kWarp] = last;
  __syncthreads();
  return before;
}

// In the first warp of a block: composes the maps of the tiles of each team, moves x past them, and
// carries what is left to the next group. The lanes beyond the first eight repeat what those do.
template <typename Scan>
__device__ inline void scan_warps(const Division& division, int group, Shared<Scan>& all) {
  const int lane = threadIdx.x % kWarp;
  const int warp = lane % kWarps;
  const Team& team = all.teams[warp];
  Carry<Scan> carry = all.carry[team.begin];
  const auto map = compose_lanes<kWarps>(all.maps[warp], lane - warp + team.begin);
  const double x = map(carry.x);
  const double before = __shfl_up_sync(kAllLanes, x, 1);
  const unsigned given = __ballot_sync(kAllLanes, lane < kWarps && all.last[warp].given);
  if (lane >= kWarps) return;
  all.x[warp] = warp == team.begin ? carry.x : before;
  if (warp == team.end - 1) {
    const unsigned mine = given >> team.begin << team.begin & ((2u << warp) - 1);
    if (mine) carry.message = all.last[31 - __clz(mine)].message;
    all.carry[team.begin] = {carry.message, x};
    if (division.maps_only) division.maps_of<typename Scan::Map>(team.part.sequence)[group] = map;
  }
}

// Scans a group, of which each warp of the team has a tile.
template <bool kFull, typename Scan>
__device__ inline void scan_group(const Scan& scan, const Team& team, const Division& division,
                                  int group, int first, const typename Scan::Tokens& tokens,
                                  Shared<Scan>& all) {
  using Map = typename Scan::Map;
  const int warp = threadIdx.x / kWarp;
  Lane<kFull, Scan> lane = {scan, tokens, team.part.sequence.index, {}};
  LastMessage<typename Scan::Message> before = show_message(lane, all);
  const auto of_warps = last_message_of_warps<kFull>(all.last, team.begin, warp);
  if (!before.given) before = of_warps;
  const auto message = before.given ? before.message : all.carry[team.begin].message;
  const Map map = compose_lanes<kWarp>(lane.fold(message), 0);
  Map lanes_before = from_before(map, 1);
  if (threadIdx.x % kWarp == 0) lanes_before = {1.0, 0.0};
  if (threadIdx.x % kWarp == kWarp - 1) all.maps[warp] = map;
  __syncthreads();
  if (warp == 0) scan_warps(division, group, all);
  __syncthreads();
  if (!division.maps_only)
    scan.store(lane.unfold(message, lanes_before(all.x[warp])), team.part.sequence.begin + first,
               tokens.count);
}

// What the groups before a part leave to it. `load` loads the tokens of a group.
template <typename Scan, typename Load>
__device__ inline Carry<Scan> carry_before(const Scan& scan, const Team& team, const Load& load,
                                           const Division& division, Shared<Scan>& all) {
  const Sequence& sequence = team.part.sequence;
  Carry<Scan> carry = {scan.start(sequence.index), 0.0};
  if (team.part.begin == 0) return carry;
  const auto* maps = division.maps_of<typename Scan::Map>(sequence);
#pragma unroll 8
  for (int group = 0; !division.maps_only && group < team.part.begin; ++group)
    carry.x = maps[group](carry.x);
  for (int group = team.part.begin - 1; group >= 0; --group) {
    const auto tokens = load(group);
    show_message(Lane<false, Scan>{scan, tokens, sequence.index, {}}, all);
    const auto last = last_message_of_warps<false>(all.last, team.begin, team.end);
    __syncthreads();  // before the next message is shown
    if (last.given) return {last.message, carry.x};
  }
  return carry;
}

template <typename Scan>
__device__ inline void scan_part(const Scan& scan, const Team& team, const Division& division,
                                 Shared<Scan>& all) {
  const Part& part = team.part;
  const Tiling<Scan::kReverse> tiling(part.sequence.end - part.sequence.begin);
  const auto first = [&](int group) { return tiling.first(group * kWarps + team.rank()); };
  const auto load = [&](int group) {
    const int count = group < part.end ? tiling.count(group * kWarps + team.rank()) : 0;
    const int64_t i = part.sequence.begin + first(group);
    return scan.wide(i, count) ? scan.template load<true>(i, count)
                               : scan.template load<false>(i, count);
  };
  const Carry<Scan> carry = carry_before(scan, team, load, division, all);
  if (threadIdx.x == team.begin * kWarp) all.carry[team.begin] = carry;
  typename Scan::Tokens next;
  if (Scan::kPrefetch) next = load(part.begin);
  for (int group = part.begin; group < part.end; ++group) {
    const auto tokens = Scan::kPrefetch ? next : load(group);
    if (Scan::kPrefetch) next = load(group + 1);  // on its way while this group is scanned
    if (Scan::kUnmasked && team.size() == kWarps && tiling.full(group * kWarps, kWarps))
      scan_group<Scan::kUnmasked>(scan, team, division, group, first(group), tokens, all);
    else
      scan_group<false>(scan, team, division, group, first(group), tokens, all);
  }
  if (part.last && threadIdx.x == team.begin * kWarp)
    scan.finish(part.sequence.index, all.carry[team.begin].message, all.carry[team.begin].x);
}

// Gives the sequences from all.next to `end` to the warps of the block, as many as fit side by
// side. False: none was left.
template <typename Scan>
__device__ inline bool form_teams(const Scan& scan, int part, int parts, int64_t end,
                                  Shared<Scan>& all) {
  __syncthreads();  // after whoever reads the teams before
  if (threadIdx.x == 0) {
    int used = 0;
    for (; all.next < end; ++all.next) {
      const Part next = Part::of(sequence_at(scan.in.sequences(), all.next), part, parts);
      if (used + next.warps() > kWarps) break;
      for (int warp = used; next.warps() > 0 && warp < kWarps; ++warp)
        all.teams[warp] = {next, used, used + next.warps()};
      used += next.warps();
    }
    all.any = used > 0;
  }
  __syncthreads();
  return all.any;
}

template <typename Scan>
__global__ void __launch_bounds__(kWarps* kWarp, Scan::kBlocks)
    gae_kernel(Scan scan, Division division) {
  __shared__ Shared<Scan> all;
  const int blocks = division.blocks_per_sequence();
  const int64_t first = int64_t(blockIdx.x) / blocks * division.neighbours;
  const int64_t end = smaller<int64_t>(first + division.neighbours, scan.in.sequence_count);
  if (threadIdx.x == 0) all.next = first;
  while (form_teams(scan, int(blockIdx.x % blocks), division.parts, end, all))
    scan_part(scan, all.teams[threadIdx.x / kWarp], division, all);
}

template <typename X>
X* typed(void* array) {
  return static_cast<X*>(array);
}
template <typename X>
const X* typed(const void* array) {
  return static_cast<const X*>(array);
}

// Short sequences share a block; few long ones, for which there is memory, have several.
Division divide(const Sequences& all, const GaeScratch& scratch) {
  constexpr int64_t kBlocks = 512;  // so many keep a GPU of today busy
  const int64_t mean = all.tokens() / larger<int64_t>(all.count, 1);
  Division out = {1, 1, false, scratch.maps};
  out.neighbours = int(clamp<int64_t>(kGroupTokens / larger<int64_t>(mean, 1), 1, kWarps));
  if (scratch.maps == nullptr) return out;
  if (scratch.map_count != all.tokens() / kGroupTokens + all.count)
    throw std::invalid_argument("gae: scratch memory of the wrong size");
  const int64_t at_most = larger<int64_t>(all.length / (2 * kGroupTokens), 1);
  out.parts = int(clamp<int64_t>(kBlocks * out.neighbours / all.count, 1, at_most));
  return out;
}

bool all_aligned(std::initializer_list<const void*> arrays) {
  bool aligned = true;
  for (const void* array : arrays) aligned &= reinterpret_cast<uintptr_t>(array) % 16 == 0;
  return aligned;
}

template <template <typename, Look> class Scan, typename X, Look kLook, typename... Arrays>
void run(const GaeInputs& in, const GaeScratch& scratch, Stream stream, Arrays... arrays) {
  if (in.sequences().length > INT_MAX)
    throw std::invalid_argument("gae: a sequence of more than 2^31 - 1 tokens");
  const bool aligned = all_aligned({in.rewards, in.values, in.bootstrap, in.mask, in.gammas,
                                    in.lams, in.rho, in.c, in.terminated, in.truncated, arrays...});
  const Scan<X, kLook> scan = {{in, aligned}, typed<X>(arrays)...};
  Division division = divide(in.sequences(), scratch);
  const int64_t owners = ceil_div(in.sequence_count, division.neighbours);
  for (const bool maps_only : {true, false}) {
    if (maps_only && division.parts == 1) continue;
    division.maps_only = maps_only;
    launch(gae_kernel<Scan<X, kLook>>, owners * division.blocks_per_sequence(), kWarps * kWarp,
           stream, scan, division);
  }
}

template <template <typename, Look> class Scan, typename... Arrays>
void dispatch(const GaeInputs& in, const GaeScratch& scratch, Stream stream, Arrays... arrays) {
  with_compute_dtype(in.dtype, [&](auto x) {
    using X = decltype(x);
    switch (look_of(in)) {
      case Look::kNothing:
        return run<Scan, X, Look::kNothing>(in, scratch, stream, arrays...);
      case Look::kMask:
        return run<Scan, X, Look::kMask>(in, scratch, stream, arrays...);
      case Look::kEverything:
        return run<Scan, X, Look::kEverything>(in, scratch, stream, arrays...);
    }
  });
}

void gae(const GaeArguments& in) {
  dispatch<Forward>(in.inputs, in.scratch, in.stream, in.advantages, in.returns);
}

void gae_backward(const GaeBackwardArguments& in) {
  dispatch<Backward>(in.inputs, in.scratch, in.stream, in.grad_advantages, in.grad_returns,
                     in.grad_rewards, in.grad_values, in.grad_bootstrap);
}

FPG_BIND(gae, gae)
FPG_BIND(gae_backward, gae_backward)

}  // namespace
}  // namespace fpg
