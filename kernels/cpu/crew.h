// A crew of threads that works through the phases of one step after another.
//
// A phase is a number of pieces that may run in any order on any thread; the next phase begins when all are done. Pieces
// are claimed one at a time, and nobody waits for a *thread*, only for claimed pieces: on a busy machine a thread that is
// not scheduled costs nothing, the others do its work. Within a step idle threads spin a little and then yield; between
// steps they sleep.
#pragma once

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

// What a step consists of. `run` may be called for different pieces of a phase at once, on threads 0 … size − 1.
struct Job {
    virtual int phases() const = 0;
    virtual int pieces(int phase) const = 0;
    virtual void run(int phase, int piece, int thread) = 0;
    virtual ~Job() = default;
};

class Crew {
  public:
    explicit Crew(int size) {
        for (int thread = 1; thread < size; thread++) members_.emplace_back([this, thread] { serve(thread); });
    }

    ~Crew() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& member : members_) member.join();
    }

    // Runs all phases; the caller is thread 0. One job at a time: other callers wait.
    void run(Job& job) {
        std::lock_guard<std::mutex> turn(turn_);
        job_ = &job;
        uint64_t step;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            step = ++step_;
            open_phase(step, 0);
        }
        if (!members_.empty()) wake_.notify_all();
        work(step, 0);
    }

  private:
    // The ticket is the whole state of the crew in one word: step, phase, and how many of the phase's pieces are still
    // unclaimed. A claim is a compare-and-swap, so a thread that slept through a step cannot take a piece of another by
    // mistake, and touches the job only while it holds a piece, that is, while the job exists.
    static constexpr int LEFT_BITS = 24, PHASE_BITS = 16;
    static constexpr uint64_t LEFT = (1 << LEFT_BITS) - 1, PHASE = (1 << PHASE_BITS) - 1;
    static constexpr int SPINS = 2000;  // about 30 µs, longer than most pieces

    static uint64_t ticket(uint64_t step, uint64_t phase, uint64_t left) {
        return (step << PHASE_BITS | phase) << LEFT_BITS | left;
    }

    void open_phase(uint64_t step, int phase) {
        while (phase < job_->phases() && job_->pieces(phase) == 0) phase++;
        const bool over = phase == job_->phases();
        finished_.store(0, std::memory_order_relaxed);
        ticket_.store(over ? ticket(step, PHASE, 0) : ticket(step, phase, job_->pieces(phase)));
    }

    void work(uint64_t step, int thread) {
        const uint64_t over = ticket(step, PHASE, 0);
        for (int idle = 0;;) {
            uint64_t seen = ticket_.load();
            if (seen == over || (seen ^ over) >> (LEFT_BITS + PHASE_BITS)) return;
            const int left = seen & LEFT;
            if (left == 0) {
                rest(idle++);
                continue;
            }
            if (!ticket_.compare_exchange_weak(seen, seen - 1)) continue;
            const int phase = seen >> LEFT_BITS & PHASE;
            const int pieces = job_->pieces(phase);
            job_->run(phase, pieces - left, thread);
            if (finished_.fetch_add(1) + 1 == pieces) open_phase(step, phase + 1);
            idle = 0;
        }
    }

    static void rest(int idle) {
        if (idle >= SPINS) {
            sched_yield();
            return;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void serve(int thread) {
        for (uint64_t seen = 0;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stopping_ || step_ != seen; });
                if (stopping_) return;
                seen = step_;
            }
            work(seen, thread);
        }
    }

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> finished_{0};
    alignas(64) Job* job_ = nullptr;
    std::mutex turn_;  // of whose job runs
    std::mutex mutex_;
    std::condition_variable wake_;
    uint64_t step_ = 0;
    bool stopping_ = false;
    std::vector<std::thread> members_;
};
