// Runs the example kernel on the emulator, right and wrong. From the folder that holds simt/ (csrc here):
//
//   fast:  g++ -std=c++17 -O2 -I. simt/example/main.cpp simt/*.cpp -o reverse && ./reverse
//   race:  g++ -std=c++17 -O1 -I. -fsanitize=thread -c simt/example/main.cpp -o main.o
//          g++ -std=c++17 -O2 -I. -DSIMT_RACE main.o simt/*.cpp -o reverse_race && ./reverse_race
#include <cstdio>
#include <initializer_list>

#include "simt/example/reverse.cuh"

int main() {
  constexpr int kBlocks = 4, kN = kBlocks * kThreads;
  float* x = static_cast<float*>(simt::allocate(kN * sizeof(float)));
  float* y = static_cast<float*>(simt::allocate(kN * sizeof(float)));
  for (int i = 0; i < kN; ++i) x[i] = static_cast<float>(i);
  for (bool barrier : {true, false}) {
    for (simt::Order order : {simt::Order::kAscending, simt::Order::kRandom}) {
      simt::set_policy({order, simt::Copies::kLate, 1});
      const char* error = barrier ? simt::launch(kBlocks, kThreads, 0, reverse_blocks<true>, x, y)
                                  : simt::launch(kBlocks, kThreads, 0, reverse_blocks<false>, x, y);
      int wrong = 0;  // a NaN is poison: it differs too
      for (int i = 0; i < kN; ++i)
        wrong += !(y[i] == x[i / kThreads * kThreads + kThreads - 1 - i % kThreads]);
      std::printf("%s barrier, policy %d: %s, %d wrong\n", barrier ? "with" : "without",
                  static_cast<int>(order), error == nullptr ? "no report" : error, wrong);
    }
  }
  return 0;
}
